// The worker's side of dataplane_bench: a real pagetide-worker with one model, and the calls that
// are measured. Every failure ends the process with a message.
#ifndef PAGETIDE_BENCH_DATAPLANE_WORKER_H_
#define PAGETIDE_BENCH_DATAPLANE_WORKER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "bench/bench_process.h"
#include "clients/cpp/client.h"

namespace pagetide::bench {

// 4 layers of 4 heads of 128 f16: rows of 1 KiB, pages of 256 tokens of 2 MiB.
inline constexpr uint32_t kPageTokens = 256;
inline constexpr uint32_t kLayers = 4;
inline constexpr uint32_t kRowBytes = 1024;
inline constexpr uint64_t kPageBytes = uint64_t{kPageTokens} * kLayers * 2 * kRowBytes;
inline constexpr uint64_t kPartBytes = uint64_t{1} << 20;  // the most that a message carries
inline constexpr uint64_t kRunBytes =
    uint64_t{kPageTokens} * kRowBytes;  // of a page's layer and kind
inline constexpr uint64_t kPoolBytes = uint64_t{640} << 20;

[[noreturn]] void Die(const std::string& what);
void Check(const absl::Status& status, const char* what);
template <typename T>
T Check(absl::StatusOr<T> result, const char* what) {
  Check(result.status(), what);
  return *std::move(result);
}

// Random bytes: [layer][K, V][token][row], as one append of `pages` pages has it.
class Rows {
 public:
  explicit Rows(uint64_t num_tokens);
  uint64_t num_tokens() const { return num_tokens_; }
  std::span<const std::byte> all() const { return bytes_; }
  std::span<const std::byte> Of(uint32_t layer, RowKind kind, uint64_t begin, uint64_t end) const {
    const uint64_t first = (layer * 2 + (kind == RowKind::kV)) * num_tokens_ + begin;
    return std::span(bytes_).subspan(first * kRowBytes, (end - begin) * kRowBytes);
  }

 private:
  const uint64_t num_tokens_;
  std::vector<std::byte> bytes_;
};

// One worker process, and clients of it over one transport or the other.
class WorkerSide {
 public:
  // Everything lies under `folder`.
  explicit WorkerSide(const std::string& folder);
  std::unique_ptr<Client> Connect(bool unix_socket, bool local_plane) const;
  const BenchProcess& process() const { return *process_; }
  const std::shared_ptr<const Model>& model() const { return model_; }

 private:
  std::string local_socket() const;

  const std::string folder_;
  const std::shared_ptr<const Model> model_;  // shared with the client's sequences
  std::unique_ptr<BenchProcess> process_;
};

std::unique_ptr<Sequence> OpenEmpty(Client& client, const WorkerSide& worker);
// All rows of tokens [begin, end) as one AppendTokens call. The rows are lent, not copied, and
// outlive all calls. Equal salts give equal tokens.
void Append(Sequence& sequence, const Rows& rows, uint64_t begin, uint64_t end, uint32_t salt);
// The number of bytes that one ReadRows call brought.
uint64_t Read(Sequence& sequence, uint64_t begin, uint64_t end);
// Reads everything again and compares every byte; how many these were.
uint64_t Verify(Sequence& sequence, const Rows& rows);
// Gives the frames of closed sequences back.
void ClearCache(Sequence& sequence);

}  // namespace pagetide::bench

#endif  // PAGETIDE_BENCH_DATAPLANE_WORKER_H_
