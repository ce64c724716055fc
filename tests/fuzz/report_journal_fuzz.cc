// The report journal as a state machine: whatever the writers do, a reader that follows by changes
// and snapshots holds the set that the journal's digests describe, and knows the open sequences.
// Input: a list of operations.
#include "worker/report_journal.h"

#include <algorithm>
#include <deque>
#include <map>
#include <set>
#include <tuple>

#include "tests/fuzz/fuzz_check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace pagetide;
  FuzzInput in(data, size);
  ReportJournal::Options options;
  options.max_changes = 1 + in.Below(8);
  options.max_closed_sequences = 1 + in.Below(4);
  ReportJournal journal(options);

  using Copy = std::tuple<PrefixHint, uint32_t, Tier>;
  std::set<Copy> held;  // what the writers did
  std::set<Copy> read;  // what the reader made of it
  std::map<SequenceId, uint64_t> open, read_open;
  std::deque<SequenceId> closed;  // remembered, oldest first: a late report does not open them
  uint64_t position = 0, sequence_position = 0;
  const auto read_all = [&] {
    for (;;) {
      const ReportJournal::Residency r = journal.ReadResidency(&position, 1 + in.Below(4));
      if (r.is_snapshot) read.clear();
      for (const ResidencyDelta& d : r.changes) {
        const Copy copy(d.hint, d.group, d.tier);
        if (d.is_removed) {
          FUZZ_CHECK(read.erase(copy) == 1);
        } else {
          FUZZ_CHECK(read.insert(copy).second);
        }
      }
      if (!r.digests) continue;
      ResidencyDigests digests{};
      for (const auto& [hint, group, tier] : read) ToggleInDigest(digests, hint, group, tier);
      FUZZ_CHECK(digests == *r.digests);
      FUZZ_CHECK(read == held);
      break;
    }
    const ReportJournal::Sequences s = journal.ReadSequences(&sequence_position);
    if (s.is_snapshot) read_open.clear();
    for (const ReportJournal::Sequence& q : s.changes) {
      if (q.is_closed) {
        read_open.erase(q.id);
      } else {
        read_open[q.id] = q.length;
      }
    }
    FUZZ_CHECK(read_open == open);
  };
  while (!in.empty()) {
    const uint8_t op = in.Take<uint8_t>();
    PrefixHint hint;
    hint.bytes[0] = static_cast<uint8_t>(in.Below(6) << 4);
    const uint32_t group = op >> 6;
    const Tier tier = (op & 32) != 0 ? Tier::kHost : Tier::kDevice;
    const SequenceId id{1, in.Below(5)};
    switch (op % 6) {
      case 0:
        journal.OnResidencyChange(hint, group, tier, false, 100);
        held.emplace(hint, group, tier);
        break;
      case 1:
        journal.OnResidencyChange(hint, group, tier, true, 100);
        held.erase({hint, group, tier});
        break;
      case 2:
        journal.OnSequence(id, "model", op);
        if (std::find(closed.begin(), closed.end(), id) == closed.end()) open[id] = op;
        break;
      case 3:
        journal.OnSequenceClosed(id);
        if (open.erase(id) > 0) closed.push_back(id);
        if (closed.size() > options.max_closed_sequences) closed.pop_front();
        break;
      case 4:
        journal.OnSequenceResumed(id, "model", op);
        std::erase(closed, id);
        open[id] = op;
        break;
      default:
        read_all();
    }
  }
  read_all();
  FUZZ_CHECK(journal.num_copies() == held.size());
  return 0;
}
