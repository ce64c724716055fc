// PageIndex: what the store knows of each page, in memory: where it is, whether it may be dropped,
// and in which order. The durable copy of the same facts is StoreDatabase's.
//
// Pages leave by recency and cost (EvictionRank), a page after the pages that continue it (tail
// first), never while a manifest or a pin protects it. About 350 bytes a page. Thread-safe; no call
// does I/O, none is longer than a few microseconds a page.
#ifndef PAGETIDE_KVSTORE_PAGE_INDEX_H_
#define PAGETIDE_KVSTORE_PAGE_INDEX_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/node_hash_map.h"
#include "base/mutex.h"
#include "core/page_store.h"
#include "kvstore/residency_feed.h"
#include "kvstore/retention.h"
#include "kvstore/segment_files.h"

namespace pagetide {

// Where a record is. Holding it keeps the file readable, even after the segment was deleted.
struct PagePlace {
  std::shared_ptr<Segment> segment;  // shared with the segment table and with other readers
  uint64_t offset = 0;
  uint32_t header_bytes = 0;
  uint64_t body_bytes = 0;    // raw
  uint64_t stored_bytes = 0;  // as it lies in the file: fewer if and only if it is compressed
  uint64_t record_bytes() const { return header_bytes + stored_bytes; }
  bool is_compressed() const { return stored_bytes != body_bytes; }
  bool SameAs(const PagePlace& other) const {
    return segment == other.segment && offset == other.offset;
  }
};

struct IndexedPage {
  PagePlace place;
  Checksum128 checksum;
  bool quarantined = false;
};

class PageIndex {
 public:
  struct Totals {
    uint64_t pages = 0;
    uint64_t logical_bytes = 0;
    uint64_t stored_bytes = 0;
    uint64_t pages_ever_read = 0;
    uint64_t bytes_ever_read = 0;  // of the present ones
    uint64_t protected_pages = 0;
    uint64_t protected_bytes = 0;
  };

  explicit PageIndex(const Clock* clock) : clock_(clock) {}
  PageIndex(const PageIndex&) = delete;
  PageIndex& operator=(const PageIndex&) = delete;

  std::optional<IndexedPage> Find(const PageKey& key) const;
  // Makes the pages the most recent ones, the first of them last, so that a prefix outlives its
  // continuation. `read` also counts them as read. Unknown keys are skipped.
  void Touch(std::span<const PageKey> keys, bool read);
  // Inserts the page as the most recent, or replaces the one under the same key (which was
  // quarantined); protection belongs to the key.
  void Publish(const PageRecordMeta& meta, const PagePlace& place, bool quarantined);
  // The page is damaged: it counts as absent until it is put again. False if it is at another place
  // now.
  bool Quarantine(const PageKey& key, const PagePlace& place);
  // False if the page is not at `from` any more.
  bool Relocate(const PageKey& key, const PagePlace& from, const PagePlace& to);
  // Removes the page, its retention and all unless it is protected. Returns its place.
  std::optional<PagePlace> Erase(const PageKey& key);
  // Removes a quarantined page, protected or not (the protection stays, for the page put in its
  // stead). False if it is not at `place` any more.
  bool EraseQuarantined(const PageKey& key, const PagePlace& place);

  // Protects every page or, if some are absent, quarantined or have another checksum, none; returns
  // those.
  std::vector<PageKey> Protect(std::span<const ManifestPageRef> pages);
  // For recovery: protects the keys, whether the pages are there or not.
  void ProtectAnyway(std::span<const ManifestPageRef> pages);
  // A manifest was deleted or has expired: its pages may go at once.
  void Unprotect(std::span<const ManifestPageRef> pages);
  // A manifest got a new version, or was not written after all. Pages that nothing else protects
  // start their grace again: a load of the version before may be under way, and who could not write
  // one will try again.
  void UnprotectWithGrace(std::span<const ManifestPageRef> pages);
  // Those that are absent, quarantined or of another checksum now.
  std::vector<PageKey> Missing(std::span<const ManifestPageRef> pages) const;

  // Replaces the page's retention. `at_least`: its times pass no sooner than that from now. False
  // if the page is absent or quarantined.
  bool SetRetention(const PageKey& key, const Retention& retention, absl::Duration at_least);
  // A manifest of this priority names the pages no more: those that had less get it. Returns them.
  std::vector<std::pair<PageKey, Retention>> InheritPriority(std::span<const ManifestPageRef> pages,
                                                             uint32_t priority);
  // Ends the pins and priorities whose time has passed.
  void ApplyExpiries();

  // A page that was just put may be about to be named by a manifest: it is kept until `put_bytes`
  // more have been put after it, or for `time`, whichever is shorter. UnprotectWithGrace counts as
  // a put.
  struct Grace {
    uint64_t put_bytes = 0;
    absl::Duration time;
  };
  // Pages to drop next, in this order, about `bytes` of them: damaged ones first, then by
  // EvictionRank, none before its children. Empty when nothing may be dropped.
  std::vector<PageKey> PickVictims(uint64_t bytes, const Grace& grace) const;
  // Keys of the pages that were put into the segment and may still be there.
  std::vector<PageKey> KeysIn(uint64_t segment) const;
  void ForgetSegment(uint64_t segment);

  // Pages whose last access has a number above `number`, most recent first, at most `limit`: what
  // the durable copy of the order lacks. Numbers only grow, so the rest of the order is older.
  std::vector<std::pair<PageKey, uint64_t>> AccessedSince(uint64_t number, size_t limit) const;
  // Before the first page: continues the numbers of an earlier life.
  void StartAccessNumbersAt(uint64_t number);
  // After the last page of an opening: ranks them all by what is there now.
  void RerankAll();

  // Present, keyed pages, and the feed number that follows this state exactly.
  std::vector<StoreEvent> Snapshot(uint64_t* next_number) const;
  ResidencyFeed* feed() { return &feed_; }
  Totals totals() const;

 private:
  struct Entry {
    PageKey key;
    PagePlace place;
    Checksum128 checksum;
    std::optional<PrefixKey> prefix, parent;
    uint32_t group = 0;
    uint32_t depth = 0;
    uint64_t access_number = 0;
    uint64_t rank = 0;              // EvictionRank as of the last access
    uint64_t put_bytes_before = 0;  // of all pages put so far, when its grace began
    MonotonicTime grace_began;
    uint32_t priority = kDefaultPriority;
    bool quarantined = false;
    bool ever_read = false;
    bool is_counted_protected = false;  // in totals_
    bool is_candidate = false;          // in candidates_
    Entry* older = nullptr;
    Entry* newer = nullptr;
  };
  using Pages = absl::node_hash_map<PageKey, Entry>;  // nodes: entries are linked
  using FamilyKey = std::pair<Digest, uint32_t>;      // prefix, layer group
  // The pages of one prefix (one a shard), and how many present pages follow them.
  struct Family {
    std::vector<Entry*> members;
    uint32_t num_children = 0;
  };
  struct Timed {
    std::optional<TwoClockEnd> priority_end;
    std::optional<TwoClockEnd> pin_end;
    Retention retention;  // as it was set
  };
  struct ByRank {
    bool operator()(const Entry* a, const Entry* b) const {
      // Damaged pages are of no use; access numbers make the rest a total order.
      if (a->quarantined != b->quarantined) return a->quarantined;
      if (a->rank != b->rank) return a->rank < b->rank;
      return a->access_number < b->access_number;
    }
  };

  static bool Matches(const Entry& entry, const ManifestPageRef& ref) {
    return !entry.quarantined && entry.checksum == ref.checksum;
  }
  void Unlink(Entry* entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void LinkNewest(Entry* entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void StartGrace(Entry* entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void UnprotectAll(std::span<const ManifestPageRef> pages, bool with_grace)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Counts the entry in or out of totals, its parents' children and the feed.
  void CountIn(Entry* entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void CountOut(Entry* entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void JoinFamily(Entry* entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void LeaveFamily(Entry* entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Counts the entry out, out of its family and last out of the candidates: whatever considers
  // pages again comes before, so that nothing points to the entry afterwards but pages_ and the
  // list.
  void Detach(Entry* entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  PagePlace EraseAt(Pages::iterator it) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool HasChildren(const Entry& entry) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool IsProtected(const PageKey& key) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Around every change of what candidacy and its order depend on: rank, quarantine, children,
  // protection.
  void Withdraw(Entry* entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Consider(Entry* entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Rerank(Entry* entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ReconsiderKey(const PageKey& key) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Clock* const clock_;
  mutable Mutex mu_;
  Pages pages_ ABSL_GUARDED_BY(mu_);
  // How many manifests name a key. A key may be absent: its page was lost or never came back.
  absl::flat_hash_map<PageKey, uint32_t> protects_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<PageKey, Timed> timed_ ABSL_GUARDED_BY(mu_);  // retentions with an end
  absl::flat_hash_map<FamilyKey, Family> families_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<uint64_t, std::vector<PageKey>> keys_in_ ABSL_GUARDED_BY(mu_);
  // What may go now: without children (or damaged) and not protected.
  absl::btree_set<Entry*, ByRank> candidates_ ABSL_GUARDED_BY(mu_);
  Entry* oldest_ ABSL_GUARDED_BY(mu_) = nullptr;
  Entry* newest_ ABSL_GUARDED_BY(mu_) = nullptr;
  Totals totals_ ABSL_GUARDED_BY(mu_);
  uint64_t put_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t last_access_number_ ABSL_GUARDED_BY(mu_) = 0;
  ResidencyFeed feed_;  // appended to under mu_
};

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_PAGE_INDEX_H_
