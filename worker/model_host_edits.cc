// Edits: the algebra of sequences, as transactions over the open sequences of a tenant.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_context.h"
#include "base/status_macros.h"
#include "worker/model_host_impl.h"

namespace pagetide {

// The open sequences of one tenant, as it knows them. Lives under the lock.
class ModelHostImpl::EditableSequences final : public SequenceEditor::Sequences {
 public:
  EditableSequences(const absl::btree_map<uint64_t, SequencePtr>& sequences,
                    const std::string& tenant)
      : sequences_(sequences), tenant_(tenant) {}

  const SequenceRows* Find(uint64_t number) const override {
    const auto it = sequences_.find(number);
    if (it == sequences_.end() || it->second->tenant != tenant_) return nullptr;
    return it->second.get();
  }
  void ForEach(absl::FunctionRef<void(uint64_t, const SequenceRows&)> fn) const override {
    for (const auto& [number, sequence] : sequences_) {
      if (sequence->tenant == tenant_ && !sequence->is_unlisted) fn(number, *sequence);
    }
  }

 private:
  const absl::btree_map<uint64_t, SequencePtr>& sequences_;
  const std::string& tenant_;
};

absl::StatusOr<EditResult> ModelHostImpl::EditLocked(const Tenant& tenant,
                                                     std::span<const SequenceHandle> handles,
                                                     std::span<const SequenceEdit> edits) {
  std::vector<SequencePtr> named;
  for (const SequenceHandle& handle : handles) {
    PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindSequence(tenant, handle.id));
    PT_RETURN_IF_ERROR(CheckHandle(*sequence, handle));
    // A prefix that was lost is gone before the edit, and the caller is told so by CutIfLost.
    if (!sequence->pending) PT_RETURN_IF_ERROR(CutIfLost(*sequence));
    named.push_back(std::move(sequence));
  }
  const EditableSequences sequences(sequences_, tenant.name);
  SequenceEditor editor(EditorOptions(), &sequences);
  EditResult result;
  for (size_t i = 0; i < edits.size(); ++i) {
    absl::StatusOr<EditOutcome> outcome = editor.Apply(edits[i]);
    if (!outcome.ok() && edits.size() > 1) {
      return WithContext(absl::StrCat("edits[", i, "]"), outcome.status());
    }
    PT_RETURN_IF_ERROR(outcome.status());
    result.outcome += *outcome;
  }
  std::vector<RowsChange> changes;
  std::vector<Sequence*> changed;
  for (auto& [number, rows] : editor.changed()) {
    Sequence& sequence = *sequences_.at(number);
    PT_RETURN_IF_ERROR(CheckMayChange("edit: ", sequence));
    rows.DropMasked(traits_);  // its references are not taken yet
    changes.push_back({&sequence, std::move(rows)});
    changed.push_back(&sequence);
  }
  // From here on nothing can fail.
  for (const RowsChange& change : changes) {
    auto& sequence = static_cast<Sequence&>(*change.rows);
    VoidCheckpoints(sequence, CommonRows(sequence, change.next));
  }
  const DroppedPages dropped = AdoptRows(std::move(changes), pages_);
  for (Sequence* sequence : changed) {
    SyncTails(*sequence, sequence->root, page_tokens(), pages_);
    sequence->was_appended = true;  // a restore that fails must not cut an edited sequence silently
    ++sequence->revision;
  }
  if (!changed.empty()) changed_.SignalAll();
  result.freed_pages = dropped.freed;
  result.cached_pages = dropped.cached;
  for (const SequencePtr& sequence : named) result.infos.push_back(InfoOf(*sequence));
  for (Sequence* sequence : changed) {
    const bool is_named = std::any_of(named.begin(), named.end(), [&](const SequencePtr& other) {
      return other.get() == sequence;
    });
    if (!is_named) result.others.push_back(InfoOf(*sequence));
  }
  counters_.rows_removed += result.outcome.removed_rows;
  counters_.rows_moved += result.outcome.moved_rows;
  return result;
}

absl::StatusOr<EditResult> ModelHostImpl::Edit(const Tenant& tenant,
                                               std::span<const SequenceHandle> sequences,
                                               std::span<const SequenceEdit> edits) {
  absl::StatusOr<EditResult> result;
  {
    MutexLock lock(&mu_);
    result = EditLocked(tenant, sequences, edits);
    ++(result.ok() ? counters_.edits : counters_.edits_refused);
  }
  Flush();
  return result;
}

absl::StatusOr<RewindResult> ModelHostImpl::Rewind(const Tenant& tenant,
                                                   const SequenceHandle& handle, int64_t length) {
  const SequenceEdit rewind = RewindEdit{NumberOf(handle.id), length};
  PT_ASSIGN_OR_RETURN(const EditResult edited, Edit(tenant, {&handle, 1}, {&rewind, 1}));
  RewindResult result;
  result.info = edited.infos.front();
  result.removed_tokens = edited.outcome.removed_rows;
  result.freed_pages = edited.freed_pages;
  return result;
}

absl::StatusOr<EditResult> ModelHostImpl::Clear(const Tenant& tenant, const SequenceHandle& handle,
                                                bool zero_data) {
  absl::StatusOr<EditResult> result;
  {
    MutexLock lock(&mu_);
    std::vector<PageId> pages;
    if (const auto found = FindSequence(tenant, handle.id); zero_data && found.ok()) {
      for (const PageTable& table : (*found)->tables) {
        for (const Extent& extent : table.extents()) pages.push_back(extent.page);
      }
    }
    const SequenceEdit clear = ClearEdit{NumberOfLocked(handle.id)};
    // Held, so that the marks below find them.
    for (PageId id : pages) pages_.Ref(pages_.Get(id));
    result = EditLocked(tenant, {&handle, 1}, {&clear, 1});
    ++(result.ok() ? counters_.edits : counters_.edits_refused);
    uint64_t scrubbed = 0;
    for (PageId id : pages) {
      Page& page = pages_.Get(id);
      if (result.ok() && page.refs() == 1) {
        pages_.UnrefAndScrub(page);  // one that is being spilled goes when that has ended
        ++scrubbed;
      } else {
        pages_.Unref(page);
      }
    }
    if (result.ok() && zero_data) {
      result->freed_pages = scrubbed;
      result->cached_pages -= std::min(result->cached_pages, scrubbed);
    }
  }
  Flush();
  return result;
}

absl::StatusOr<PositionExtents> ModelHostImpl::QueryExtent(const Tenant& tenant, SequenceId id) {
  MutexLock lock(&mu_);
  PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindSequence(tenant, id));
  PositionExtents extents{.revision = sequence->revision};
  for (uint32_t g = 0; g < num_groups(); ++g) extents.groups.push_back(sequence->ExtentOf(g));
  return extents;
}

}  // namespace pagetide
