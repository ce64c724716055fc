// What the tests of transfers between two hosts share.
#ifndef PAGETIDE_TESTS_WORKER_SEQUENCE_TRANSFER_FIXTURE_H_
#define PAGETIDE_TESTS_WORKER_SEQUENCE_TRANSFER_FIXTURE_H_

#include <functional>
#include <vector>

#include "tests/worker/model_host_fixture.h"
#include "worker/sequence_transfer.h"

namespace pagetide {

inline constexpr char kTarget[] = "10.0.0.7:7080";

inline SequenceHandle HandleOf(const SequenceInfo& info) {
  return {info.id, info.epoch, std::nullopt};
}
inline MonotonicTime Soon() {
  return HostUnderTest::Soon();
}
inline HostUnderTest::Setup Alone(uint32_t num_frames = 16, uint64_t incarnation = 7) {
  return {.num_frames = num_frames, .no_store = true, .incarnation = incarnation};
}
inline uint64_t FreeFrames(HostUnderTest& t) {
  uint64_t free = 0;
  for (const PoolUsage& pool : t.host->Usage()) free += pool.free_frames;
  return free;
}

using Change = std::function<void(uint32_t page, std::vector<std::byte>& body)>;

// Pushes what is wanted, each page in two parts, as `change` leaves it.
inline absl::Status PushAll(OutgoingSequence& from, IncomingSequence& to,
                            const Change& change = nullptr) {
  return from.ReadPages(to.wanted(), Soon(),
                        [&](uint32_t page, std::span<const std::byte> bytes) -> absl::Status {
                          std::vector<std::byte> body(bytes.begin(), bytes.end());
                          if (change != nullptr) change(page, body);
                          const std::span<const std::byte> whole(body);
                          const auto first = to.Write(page, 0, whole.first(100));
                          if (!first.ok()) return first.status();
                          return to.Write(page, 100, whole.subspan(100)).status();
                        });
}

struct Sent {
  SequenceInfo info;
  uint64_t pushed = 0;
};
inline absl::StatusOr<Sent> SendTo(HostUnderTest& a, const SequenceInfo& info, HostUnderTest& b,
                                   TransferKind kind) {
  auto from = TransfersOf(*a.host).BeginOutgoing(a.tenant, HandleOf(info), kind, kTarget, Soon());
  if (!from.ok()) return from.status();
  auto to = TransfersOf(*b.host).BeginIncoming(b.tenant, (*from)->plan(), Soon());
  if (!to.ok()) return to.status();
  const absl::Status pushed = PushAll(**from, **to);
  if (!pushed.ok()) return pushed;
  auto committed = (*to)->Commit();
  if (!committed.ok()) return committed.status();
  return Sent{committed->value_or(SequenceInfo()), (*to)->wanted().size()};
}

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_WORKER_SEQUENCE_TRANSFER_FIXTURE_H_
