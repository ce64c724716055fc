#include "core/page_directory.h"

#include <utility>

#include "base/check.h"

namespace pagetide {

PageDirectory::PageDirectory(uint32_t num_groups, uint32_t num_frames, size_t max_known_stored)
    : max_known_stored_(max_known_stored) {
  groups_.reserve(num_groups);
  for (uint32_t g = 0; g < num_groups; ++g) groups_.emplace_back(num_frames);
}

void PageDirectory::ReleaseFrame(uint32_t group, FrameId frame) {
  PT_CHECK(groups_[group].frames.Release(frame).ok());
}

Page& PageDirectory::Add(Page page) {
  const PageId id = page.id();
  return *pages_.emplace(id, std::make_unique<Page>(std::move(page))).first->second;
}

Page& PageDirectory::CreateTail(uint32_t group, absl::string_view tenant, FrameId frame,
                                uint32_t depth, std::optional<PageId> parent) {
  Page& page =
      Add(Page::NewTail(PageId(next_id_++), group, std::string(tenant), frame, depth, parent));
  page.Ref();
  // The caller has zeroed it if another tenant had it last.
  groups_[group].frames.MarkClean(frame);
  EnterFrame(page);
  return page;
}

Page& PageDirectory::AdoptStored(uint32_t group, absl::string_view tenant, uint32_t rows,
                                 uint32_t depth, std::optional<PageId> parent,
                                 const PrefixKey& prefix, const PrefixKey& parent_prefix,
                                 const PageKey& store_key, const Checksum128& checksum,
                                 std::shared_ptr<const std::vector<uint32_t>> tokens,
                                 bool has_inputs) {
  if (Page* known = FindKeyed(group, prefix)) return *known;
  Page& page = Add(Page::NewStored(PageId(next_id_++), group, std::string(tenant), rows, depth,
                                   parent, prefix, parent_prefix, store_key, checksum));
  PT_CHECK(groups_[group].index.InsertKeyed(prefix, parent_prefix, page.id(), std::move(tokens),
                                            has_inputs));
  UpdateKnown(page);
  return page;
}

Page& PageDirectory::AdoptSealed(uint32_t group, absl::string_view tenant, uint32_t rows,
                                 uint32_t depth, std::optional<PageId> parent,
                                 const Page::StoredAs& stored) {
  if (const Page* known = FindSealed(group, stored.key, stored.checksum)) return Get(known->id());
  Page& page = Add(
      Page::NewSealed(PageId(next_id_++), group, std::string(tenant), rows, depth, parent, stored));
  sealed_[stored.key] = page.id();
  UpdateKnown(page);
  return page;
}

const Page* PageDirectory::FindSealed(uint32_t group, const PageKey& key,
                                      const Checksum128& checksum) const {
  const auto it = sealed_.find(key);
  if (it == sealed_.end()) return nullptr;
  const Page* const known = Find(it->second);
  return known->group() == group && known->stored()->checksum == checksum ? known : nullptr;
}

Page* PageDirectory::Find(PageId id) {
  const auto it = pages_.find(id);
  return it == pages_.end() ? nullptr : it->second.get();
}

const Page* PageDirectory::Find(PageId id) const {
  const auto it = pages_.find(id);
  return it == pages_.end() ? nullptr : it->second.get();
}

Page& PageDirectory::Get(PageId id) {
  Page* page = Find(id);
  PT_CHECK(page != nullptr);
  return *page;
}

Page* PageDirectory::FindKeyed(uint32_t group, const PrefixKey& prefix) {
  const std::optional<PageId> id = groups_[group].index.FindKeyed(prefix);
  return id ? Find(*id) : nullptr;
}

bool PageDirectory::Unref(Page& page) {
  if (!page.Unref()) return false;
  // A copy in flight holds no reference: its completion finds the page again by id, or not at all.
  const bool is_worth_keeping = page.is_findable() && page.state() != PageState::kQuarantined;
  if (is_worth_keeping) {
    UpdateKnown(page);
    return false;
  }
  if (page.pins() > 0 || page.state() == PageState::kSpilling ||
      page.state() == PageState::kRestoring) {
    return false;  // Unpin or the end of the copy forgets it
  }
  Forget(page);
  return true;
}

void PageDirectory::Pin(Page& page) {
  page.Pin();
  UpdateEvictable(page);
  UpdateKnown(page);
}

void PageDirectory::Unpin(Page& page) {
  if (!page.Unpin()) return;
  if (page.state() == PageState::kQuarantined && page.has_frame()) {
    FreeFrame(page, page.ReleaseQuarantined());
  }
  if (page.refs() == 0 && (!page.is_findable() || page.state() == PageState::kQuarantined) &&
      page.state() != PageState::kSpilling && page.state() != PageState::kRestoring) {
    Forget(page);
    return;
  }
  UpdateEvictable(page);
  UpdateKnown(page);
}

void PageDirectory::SetParent(Page& page, PageId parent) {
  page.SetParent(parent);
  if (!page.has_frame()) return;
  groups_[page.group()].policy->OnErase(page.id());
  groups_[page.group()].policy->OnInsert(page.id(), parent);
  UpdateEvictable(page);
}

void PageDirectory::UpdateEvictable(const Page& page) {
  groups_[page.group()].policy->SetEvictable(
      page.id(), page.pins() == 0 && page.state() == PageState::kResident);
}

void PageDirectory::UpdateUnstored(const Page& page) {
  if (page.is_keyed() && page.state() == PageState::kResident && !page.is_stored())
    unstored_.insert(page.id());
  else
    unstored_.erase(page.id());
}

void PageDirectory::EnterFrame(const Page& page) {
  groups_[page.group()].policy->OnInsert(page.id(), page.parent());
  UpdateEvictable(page);
  if (page.is_keyed() && page.is_readable()) {
    changes_.push_back({*page.prefix(), page.group(), /*removed=*/false});
  }
}

void PageDirectory::FreeFrame(const Page& page, FrameId frame) {
  groups_[page.group()].policy->OnErase(page.id());
  ReleaseFrame(page.group(), frame);
  if (page.is_scrub()) groups_[page.group()].frames.MarkDirty(frame);
}

void PageDirectory::LeaveFrame(const Page& page, FrameId frame) {
  FreeFrame(page, frame);
  if (page.is_keyed() && !page.is_hidden())
    changes_.push_back({*page.prefix(), page.group(), /*removed=*/true});
}

void PageDirectory::BeginSpill(Page& page) {
  page.BeginSpill();
  UpdateEvictable(page);
  UpdateUnstored(page);
}

void PageDirectory::FinishSpill(Page& page, const std::optional<Page::StoredAs>& stored) {
  page.FinishSpill(stored);
  if (page.refs() == 0 && page.pins() == 0 && !page.is_findable()) {
    Forget(page);
    return;
  }
  UpdateEvictable(page);
  UpdateUnstored(page);
}

void PageDirectory::BeginRestore(Page& page, FrameId frame) {
  page.BeginRestore(frame);
  UpdateKnown(page);
  groups_[page.group()].policy->OnInsert(page.id(), page.parent());
  UpdateEvictable(page);
}

void PageDirectory::FinishRestore(Page& page, const std::optional<Checksum128>& converted) {
  page.FinishRestore(converted);
  groups_[page.group()].frames.MarkClean(page.frame());  // a restore overwrites the whole frame
  if (page.refs() == 0 && page.pins() == 0 && !page.is_findable()) {
    Forget(page);
    return;
  }
  UpdateEvictable(page);
  if (page.is_keyed()) changes_.push_back({*page.prefix(), page.group(), /*removed=*/false});
}

void PageDirectory::AbortRestore(Page& page) {
  const FrameId frame = page.AbortRestore();
  groups_[page.group()].policy->OnErase(page.id());
  ReleaseFrame(page.group(), frame);
  if (page.refs() == 0 && page.pins() == 0 && !page.is_findable())
    Forget(page);
  else
    UpdateKnown(page);
}

void PageDirectory::SetStored(Page& page, const Page::StoredAs& stored) {
  if (page.is_stored() && !page.is_keyed() && !page.stored()->is_shared) {
    stale_keys_.push_back(page.stored()->key);
  }
  ForgetSealed(page);  // put again it may have another key
  page.SetStored(stored);
  UpdateUnstored(page);
  if (!page.is_keyed()) sealed_.try_emplace(stored.key, page.id());
}

void PageDirectory::ForgetSealed(const Page& page) {
  if (!page.is_stored() || page.is_keyed()) return;
  const auto it = sealed_.find(page.stored()->key);
  if (it != sealed_.end() && it->second == page.id()) sealed_.erase(it);
}

void PageDirectory::Quarantine(Page& page) {
  ForgetSealed(page);
  const bool was_reported = page.is_readable() && page.is_keyed() && !page.is_hidden();
  const std::optional<FrameId> frame = page.Quarantine();
  UpdateUnstored(page);
  UpdateKnown(page);
  if (frame) FreeFrame(page, *frame);
  if (was_reported) changes_.push_back({*page.prefix(), page.group(), /*removed=*/true});
  groups_[page.group()].index.Erase(page.id());
  if (page.refs() == 0 && page.pins() == 0) pages_.erase(page.id());
}

void PageDirectory::Evict(Page& page) {
  PT_CHECK(page.pins() == 0 && page.state() == PageState::kResident && page.is_clean());
  if (!page.is_stored()) {
    Forget(page);
    return;
  }
  const FrameId frame = page.DropFrame();
  LeaveFrame(page, frame);
  UpdateKnown(page);
}

void PageDirectory::BeginWrite(Page& page) {
  if (std::optional<PageKey> stale = page.BeginWrite()) stale_keys_.push_back(*stale);
}

void PageDirectory::SetTailTokens(Page& page, const PrefixKey& parent_prefix,
                                  std::vector<uint32_t> tokens, bool has_inputs) {
  PrefixIndex& index = groups_[page.group()].index;
  if (tokens.size() < 2 || groups_[page.group()].is_whole) {
    index.Erase(page.id());
    return;
  }
  index.UpsertTail(parent_prefix, page.id(), std::move(tokens), has_inputs);
}

bool PageDirectory::SetKey(Page& page, const PrefixKey& prefix, const PrefixKey& parent_prefix,
                           const PageKey& store_key,
                           std::shared_ptr<const std::vector<uint32_t>> tokens, bool has_inputs) {
  PrefixIndex& index = groups_[page.group()].index;
  index.Erase(page.id());  // its entry as a tail
  if (!index.InsertKeyed(prefix, parent_prefix, page.id(), std::move(tokens), has_inputs))
    return false;
  page.SetKey(prefix, parent_prefix, store_key);
  UpdateUnstored(page);
  if (page.is_readable()) changes_.push_back({prefix, page.group(), /*removed=*/false});
  return true;
}

uint64_t PageDirectory::DropUnreferenced(bool scrub) {
  std::vector<PageId> victims;
  for (const auto& [id, page] : pages_) {
    if (page->refs() == 0 && page->pins() == 0 && !page->is_hidden()) victims.push_back(id);
  }
  for (PageId id : victims) {
    Page& page = Get(id);
    if (scrub) page.SetScrub();
    if (page.state() != PageState::kSpilling && page.state() != PageState::kRestoring) {
      Forget(page);
      continue;
    }
    // A copy of it is in flight: nobody finds it from now on, and it goes when that ends.
    ForgetSealed(page);
    groups_[page.group()].index.Erase(page.id());
    if (page.is_keyed() && page.is_readable()) {
      changes_.push_back({*page.prefix(), page.group(), /*removed=*/true});
    }
    page.Hide();
  }
  return victims.size();
}

void PageDirectory::Forget(Page& page) {
  PT_CHECK(page.pins() == 0 && page.refs() == 0);
  // A private record is of no use to anybody else; a keyed one is.
  if (page.is_stored() && !page.is_keyed() && !page.stored()->is_shared) {
    stale_keys_.push_back(page.stored()->key);
  }
  ForgetSealed(page);
  groups_[page.group()].index.Erase(page.id());
  unstored_.erase(page.id());
  known_.Remove(page.id());
  if (page.has_frame()) LeaveFrame(page, page.frame());
  pages_.erase(page.id());
}

void PageDirectory::UpdateKnown(const Page& page) {
  if (page.state() == PageState::kStored && page.refs() == 0 && page.pins() == 0)
    known_.Add(page.id(), page.tenant());
  else
    known_.Remove(page.id());
}

void PageDirectory::TrimKnown() {
  for (PageId id : known_.TakeExcess(max_known_stored_)) Forget(Get(id));
}

std::vector<FrameChange> PageDirectory::TakeFrameChanges() {
  return std::exchange(changes_, {});
}

std::vector<PageKey> PageDirectory::TakeStaleKeys() {
  return std::exchange(stale_keys_, {});
}

void PageDirectory::CheckInvariants() const {
  size_t num_known = 0;
  for (const auto& [id, page] : pages_) {
    const bool is_known =
        page->state() == PageState::kStored && page->refs() == 0 && page->pins() == 0;
    PT_CHECK(known_.Contains(id) == is_known);
    num_known += is_known;
  }
  PT_CHECK(known_.size() == num_known);
  for (uint32_t g = 0; g < num_groups(); ++g) {
    std::vector<bool> held(groups_[g].frames.num_frames() + 1, false);
    uint32_t num_held = 0;
    for (const auto& [id, page] : pages_) {
      if (page->group() != g) continue;
      PT_CHECK(page->refs() > 0 || page->is_findable() || page->pins() > 0 ||
               page->state() == PageState::kSpilling || page->state() == PageState::kRestoring);
      if (!page->has_frame()) continue;
      PT_CHECK(!held[page->frame().value()]);
      PT_CHECK(!groups_[g].frames.IsFree(page->frame()));
      held[page->frame().value()] = true;
      ++num_held;
    }
    PT_CHECK(groups_[g].policy->num_resident() == num_held);
    PT_CHECK(num_held + groups_[g].frames.num_free() <= groups_[g].frames.num_frames());
  }
  size_t num_unstored = 0;
  for (const auto& [id, page] : pages_) {
    if (!page->is_keyed() || page->state() != PageState::kResident || page->is_stored()) continue;
    PT_CHECK(unstored_.contains(id));
    ++num_unstored;
  }
  PT_CHECK(unstored_.size() == num_unstored);
  for (const auto& [key, id] : sealed_) {
    const Page* const page = Find(id);
    PT_CHECK(page != nullptr && !page->is_keyed() && page->is_stored());
    PT_CHECK(page->stored()->key == key);
  }
}

}  // namespace pagetide
