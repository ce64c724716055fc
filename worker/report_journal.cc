#include "worker/report_journal.h"

#include <algorithm>
#include <utility>

namespace pagetide {

void ReportJournal::OnResidencyChange(const PrefixHint& hint, uint32_t group, Tier tier,
                                      bool is_removed, uint64_t page_bytes) {
  {
    MutexLock lock(&mu_);
    const Copy copy{hint, group, tier};
    if (is_removed) {
      if (copies_.erase(copy) == 0) return;
    } else if (!copies_.emplace(copy, page_bytes).second) {
      return;
    }
    ToggleInDigest(digests_, hint, group, tier);
    ring_.push_back({hint, group, tier, is_removed, page_bytes});
    ++last_change_;
    if (ring_.size() > options_.max_changes) ring_.pop_front();
  }
  changed_.SignalAll();
}

ReportJournal::Residency ReportJournal::ReadResidency(uint64_t* position,
                                                      size_t max_changes) const {
  Residency result;
  MutexLock lock(&mu_);
  const uint64_t first = last_change_ - ring_.size() + 1;  // position of ring_.front()
  if (*position == 0 || *position + 1 < first) {
    result.is_snapshot = true;
    result.changes.reserve(copies_.size());
    for (const auto& [copy, page_bytes] : copies_) {
      result.changes.push_back({copy.hint, copy.group, copy.tier, false, page_bytes});
    }
    result.digests = digests_;
    *position = last_change_;
    return result;
  }
  const size_t begin = static_cast<size_t>(*position + 1 - first);
  const size_t end = std::min(ring_.size(), begin + max_changes);
  result.changes.assign(ring_.begin() + static_cast<ptrdiff_t>(begin),
                        ring_.begin() + static_cast<ptrdiff_t>(end));
  *position += end - begin;
  if (end == ring_.size()) result.digests = digests_;
  return result;
}

void ReportJournal::WaitForResidency(uint64_t position, uint64_t* seen_wakes,
                                     absl::Duration timeout) {
  MutexLock lock(&mu_);
  if (last_change_ == position && num_wakes_ == *seen_wakes) {
    changed_.WaitWithTimeout(&mu_, timeout);
  }
  *seen_wakes = num_wakes_;
}

void ReportJournal::Wake() {
  {
    MutexLock lock(&mu_);
    ++num_wakes_;
  }
  changed_.SignalAll();
}

size_t ReportJournal::num_copies() const {
  MutexLock lock(&mu_);
  return copies_.size();
}

void ReportJournal::TouchSequence(SequenceId id, SequenceState& state) {
  sequence_order_.erase(state.version);
  state.version = ++last_version_;
  sequence_order_.emplace(state.version, id);
}

void ReportJournal::OnSequence(SequenceId id, absl::string_view model_digest, uint64_t length) {
  MutexLock lock(&mu_);
  SequenceState& state = sequences_[id];
  if (state.is_closed) return;  // a late report of its length
  if (state.model_digest != model_digest) state.model_digest = std::string(model_digest);
  state.length = length;
  TouchSequence(id, state);
}

void ReportJournal::OnSequenceResumed(SequenceId id, absl::string_view model_digest,
                                      uint64_t length) {
  {
    MutexLock lock(&mu_);
    const auto it = sequences_.find(id);
    if (it != sequences_.end() && it->second.is_closed) {
      it->second.is_closed = false;
      std::erase(closed_, id);
    }
  }
  OnSequence(id, model_digest, length);
}

void ReportJournal::OnSequenceClosed(SequenceId id) {
  MutexLock lock(&mu_);
  const auto it = sequences_.find(id);
  if (it == sequences_.end() || it->second.is_closed) return;
  it->second.is_closed = true;
  TouchSequence(id, it->second);
  closed_.push_back(id);
  if (closed_.size() <= options_.max_closed_sequences) return;
  const auto oldest = sequences_.find(closed_.front());
  forgotten_version_ = oldest->second.version;
  sequence_order_.erase(oldest->second.version);
  sequences_.erase(oldest);
  closed_.pop_front();
}

ReportJournal::Sequences ReportJournal::ReadSequences(uint64_t* position) const {
  Sequences result;
  MutexLock lock(&mu_);
  result.is_snapshot = *position == 0 || *position < forgotten_version_;
  const uint64_t after = result.is_snapshot ? 0 : *position;
  for (auto it = sequence_order_.upper_bound(after); it != sequence_order_.end(); ++it) {
    const SequenceState& state = sequences_.find(it->second)->second;
    if (result.is_snapshot && state.is_closed) continue;
    result.changes.push_back({it->second, state.model_digest, state.length, state.is_closed});
  }
  *position = last_version_;
  return result;
}

}  // namespace pagetide
