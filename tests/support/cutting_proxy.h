// CuttingProxy: a TCP forwarder on loopback whose connections a test cuts in mid-stream, as the
// network or a dying client does: both ends find the connection closed with their stream open.
// Thread-safe.
#ifndef PAGETIDE_TESTS_SUPPORT_CUTTING_PROXY_H_
#define PAGETIDE_TESTS_SUPPORT_CUTTING_PROXY_H_

#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "base/mutex.h"

namespace pagetide::testing {

class CuttingProxy {
 public:
  // Forwards to `target`, "127.0.0.1:port".
  explicit CuttingProxy(const std::string& target);
  // Cuts what is left.
  ~CuttingProxy();
  CuttingProxy(const CuttingProxy&) = delete;
  CuttingProxy& operator=(const CuttingProxy&) = delete;

  const std::string& address() const { return address_; }
  // Closes every connection there is. Later ones are forwarded again.
  void Cut();
  // Bytes that went from clients to the target so far.
  uint64_t forwarded_bytes() const;

 private:
  struct Connection {
    int client = -1;
    int server = -1;
    bool is_cut = false;
  };
  void Accept();
  void Pump(size_t index, bool to_server);
  void CutLocked(Connection& connection) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const std::string target_;
  int listener_ = -1;
  std::string address_;

  mutable Mutex mu_;
  bool is_stopping_ ABSL_GUARDED_BY(mu_) = false;
  uint64_t forwarded_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  std::vector<Connection> connections_ ABSL_GUARDED_BY(mu_);
  std::vector<std::thread> pumps_ ABSL_GUARDED_BY(mu_);
  std::thread acceptor_;
};

}  // namespace pagetide::testing

#endif  // PAGETIDE_TESTS_SUPPORT_CUTTING_PROXY_H_
