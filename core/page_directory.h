// PageDirectory: every page a host knows, the frames they are in, and the ways to find them: by id,
// by key, by tokens, by eviction order. Decides nothing that waits; does no I/O.
//
// Not thread-safe: the host locks. Invariants (CheckInvariants): a frame is free or held by exactly
// one page; a page in the eviction order is in a frame; pins > 0, writers and copies in flight are
// never evictable; a private page without references and without a shared record does not exist.
#ifndef PAGETIDE_CORE_PAGE_DIRECTORY_H_
#define PAGETIDE_CORE_PAGE_DIRECTORY_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "core/eviction_policy.h"
#include "core/frame_pool.h"
#include "core/ids.h"
#include "core/keys.h"
#include "core/known_pages.h"
#include "core/model.h"
#include "core/page.h"
#include "core/prefix_index.h"

namespace pagetide {

// A keyed page entered or left a device frame.
struct FrameChange {
  PrefixKey prefix;
  uint32_t group = 0;
  bool removed = false;
};

class PageDirectory {
 public:
  // `max_known_stored`: pages in the store that nobody references but are remembered, so that
  // prompts can match part of them; TrimKnown forgets what is more.
  PageDirectory(uint32_t num_groups, uint32_t num_frames, size_t max_known_stored);

  // Pages of this group are whole: nobody can use some of their rows. Before its first page.
  void SetWhole(uint32_t group) { groups_[group].is_whole = true; }

  // --- frames ---
  std::optional<FramePool::Grant> AllocateFrame(uint32_t group, absl::string_view tenant) {
    return groups_[group].frames.Allocate(tenant);
  }
  void ReleaseFrame(uint32_t group, FrameId frame);
  const FramePool& frames(uint32_t group) const { return groups_[group].frames; }
  const EvictionPolicy& policy(uint32_t group) const { return *groups_[group].policy; }
  const PrefixIndex& index(uint32_t group) const { return groups_[group].index; }
  uint32_t num_groups() const { return static_cast<uint32_t>(groups_.size()); }

  // --- pages ---
  // With one reference (the creator's) and no pin.
  Page& CreateTail(uint32_t group, absl::string_view tenant, FrameId frame, uint32_t depth,
                   std::optional<PageId> parent);
  // Without references. Returns the page that has this key already, if there is one.
  Page& AdoptStored(uint32_t group, absl::string_view tenant, uint32_t rows, uint32_t depth,
                    std::optional<PageId> parent, const PrefixKey& prefix,
                    const PrefixKey& parent_prefix, const PageKey& store_key,
                    const Checksum128& checksum,
                    std::shared_ptr<const std::vector<uint32_t>> tokens, bool has_inputs);
  // A private, sealed page of saved state, without references. Returns the page that stands for the
  // same record with the same body already, if there is one.
  Page& AdoptSealed(uint32_t group, absl::string_view tenant, uint32_t rows, uint32_t depth,
                    std::optional<PageId> parent, const Page::StoredAs& stored);
  // The private page that stands for this record with this body; nullptr when there is none.
  const Page* FindSealed(uint32_t group, const PageKey& key, const Checksum128& checksum) const;
  // Resident keyed pages that the store does not have and nobody is putting there, oldest first.
  const absl::btree_set<PageId>& unstored() const { return unstored_; }
  // nullptr when unknown.
  Page* Find(PageId id);
  const Page* Find(PageId id) const;
  Page& Get(PageId id);
  Page* FindKeyed(uint32_t group, const PrefixKey& prefix);

  void Ref(Page& page) {
    page.Ref();
    if (page.refs() == 1) UpdateKnown(page);
  }
  // Drops what nobody can reach any more. Invalidates `page` when it returns true.
  bool Unref(Page& page);
  // As Unref, but the page does not stay in the cache, and its frame is zeroed before the next
  // grant. If others still reference or pin it, that holds when the last of them lets go.
  bool UnrefAndScrub(Page& page) {
    page.SetScrub();
    return Unref(page);
  }
  void Pin(Page& page);
  void Unpin(Page& page);
  void Touch(Page& page) { groups_[page.group()].policy->OnTouch(page.id()); }
  // Of pages that only the store has: that a prompt found it.
  void TouchKnown(const Page& page) { known_.Touch(page.id()); }
  // Forgets what is known beyond max_known_stored. Apart from what makes pages known, so that all
  // pages of one prompt are there until it has chosen from them. At the end of each call.
  void TrimKnown();
  // The page in front of it is another one from here on. It counts as used just now.
  void SetParent(Page& page, PageId parent);

  // --- transitions, kept in step with frames, index and eviction order ---
  void BeginSpill(Page& page);
  void FinishSpill(Page& page, const std::optional<Page::StoredAs>& stored);
  void BeginRestore(Page& page, FrameId frame);
  void FinishRestore(Page& page, const std::optional<Checksum128>& converted = std::nullopt);
  void AbortRestore(Page& page);
  // Nobody finds or reads it from here on. Those who have it pinned keep its frame until the last
  // of them lets go.
  void Quarantine(Page& page);
  // Frees the frame of a clean, unpinned, resident page. The page is forgotten if nobody needs it.
  void Evict(Page& page);
  void BeginWrite(Page& page);
  // A save put an immutable page into the store.
  void SetStored(Page& page, const Page::StoredAs& stored);
  void SetTailTokens(Page& page, const PrefixKey& parent_prefix, std::vector<uint32_t> tokens,
                     bool has_inputs);
  // Makes a full page findable. False if another page has the key: this one stays private.
  bool SetKey(Page& page, const PrefixKey& prefix, const PrefixKey& parent_prefix,
              const PageKey& store_key, std::shared_ptr<const std::vector<uint32_t>> tokens,
              bool has_inputs);
  // Forgets unreferenced keyed pages that are not pinned. Returns how many. Those of which a copy
  // is in flight are found no more, and go when it ends. `scrub`: their frames are zeroed before
  // the next grant.
  uint64_t DropUnreferenced(bool scrub = false);

  // --- what happened since the last call ---
  std::vector<FrameChange> TakeFrameChanges();
  // Private records in the store that no page stands behind any more.
  std::vector<PageKey> TakeStaleKeys();

  template <typename Fn>
  void ForEachPage(Fn fn) const {
    for (const auto& [id, page] : pages_) fn(*page);
  }
  size_t num_pages() const { return pages_.size(); }
  // Ends the process if an invariant of this class is broken. O(pages). For tests and Quiesce.
  void CheckInvariants() const;

 private:
  struct Group {
    explicit Group(uint32_t num_frames)
        : frames(num_frames), policy(std::make_unique<LeafFirstLru>()) {}
    FramePool frames;
    PrefixIndex index;
    std::unique_ptr<EvictionPolicy> policy;
    bool is_whole = false;
  };

  Page& Add(Page page);
  void UpdateEvictable(const Page& page);
  // After whatever changed what unstored() says of the page.
  void UpdateUnstored(const Page& page);
  void EnterFrame(const Page& page);
  // Frees a frame that the page had.
  void FreeFrame(const Page& page, FrameId frame);
  // As FreeFrame, of a page that was said to be there.
  void LeaveFrame(const Page& page, FrameId frame);
  // Removes the page altogether: frame, index, eviction order.
  void Forget(Page& page);
  void ForgetSealed(const Page& page);
  // After whatever changed whether only the store has the page and nobody needs it now.
  void UpdateKnown(const Page& page);

  std::vector<Group> groups_;
  absl::flat_hash_map<PageId, std::unique_ptr<Page>> pages_;
  // Private pages by the record that stands for them, so that all loads of one saved state share
  // them.
  absl::flat_hash_map<PageKey, PageId> sealed_;
  absl::btree_set<PageId> unstored_;
  const size_t max_known_stored_;
  KnownPages known_;
  uint64_t next_id_ = 1;
  std::vector<FrameChange> changes_;
  std::vector<PageKey> stale_keys_;
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_PAGE_DIRECTORY_H_
