// A program that a benchmark runs beside itself, and what the benchmark shares with it. One thread.
#ifndef PAGETIDE_BENCH_BENCH_PROCESS_H_
#define PAGETIDE_BENCH_BENCH_PROCESS_H_

#include <sys/types.h>

#include <map>
#include <string>
#include <vector>

namespace pagetide::bench {

class BenchProcess {
 public:
  // Starts `path` and waits for its line "NAME ready key=value …" on stdout; its stderr is ours.
  // Exits with a message when the line does not come.
  BenchProcess(const std::string& path, const std::vector<std::string>& args);
  // SIGTERM, and SIGKILL if that does not end it within ten seconds.
  ~BenchProcess();
  BenchProcess(const BenchProcess&) = delete;
  BenchProcess& operator=(const BenchProcess&) = delete;

  // Value of `key` in the ready line; exits when there is none.
  const std::string& Value(const std::string& key) const;
  pid_t pid() const { return pid_; }
  // User and system time of all its threads since its start.
  double CpuSeconds() const;

 private:
  pid_t pid_ = -1;
  int output_ = -1;
  std::map<std::string, std::string> values_;
};

// As above, of this process.
double OwnCpuSeconds();
// Path of the running program; its folder with `name` appended.
std::string OwnPath();
std::string SiblingPath(const std::string& name);

}  // namespace pagetide::bench

#endif  // PAGETIDE_BENCH_BENCH_PROCESS_H_
