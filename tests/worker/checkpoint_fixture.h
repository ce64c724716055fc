// What the tests of checkpoints share.
#ifndef PAGETIDE_TESTS_WORKER_CHECKPOINT_FIXTURE_H_
#define PAGETIDE_TESTS_WORKER_CHECKPOINT_FIXTURE_H_

#include <cstdint>
#include <optional>

#include "tests/worker/session_fixture.h"

namespace pagetide {

inline constexpr uint32_t kWindow = 24;  // tokens, of the groups that have one

inline SequenceHandle Handle(const SequenceInfo& info) {
  return {info.id, info.epoch, std::nullopt};
}
inline MonotonicTime Soon() {
  return HostUnderTest::Soon();
}
// In the store of the host.
inline uint64_t Manifests(HostUnderTest& t) {
  return t.store->GetStats(Soon())->manifests;
}

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_WORKER_CHECKPOINT_FIXTURE_H_
