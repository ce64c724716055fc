// Page: content, wherever it is. The state machine that owns a page's location, references, pins,
// checksums and the single copy in flight (DESIGN rules 1, 2, 5, 12).
//
//            BeginSpill            FinishSpill
//   resident ──────────▶ spilling ─────────────▶ resident (and stored, if the store took it)
//      │  ▲                 readable, not writable
//      │  │ FinishRestore(ok)
//      │  restoring ◀───────── stored            one restore in flight, shared by all who wait
//      │      │  BeginRestore    ▲
//      │      └──────────────────┤ AbortRestore (the store did not answer)
//      └─────────────────────────┘ DropFrame (only when stored)
//   any ── Quarantine ──▶ quarantined: its bytes failed their checksum or are gone; never used
//   again
//
// A page is full or a tail. Full pages never change. A tail is written only by its one owner.
// Not thread-safe: PageDirectory's owner locks. Misuse is a broken invariant and ends the process.
#ifndef PAGETIDE_CORE_PAGE_H_
#define PAGETIDE_CORE_PAGE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "base/checksum.h"
#include "core/ids.h"
#include "core/keys.h"

namespace pagetide {

enum class PageState : uint8_t { kResident, kSpilling, kStored, kRestoring, kQuarantined };

absl::string_view PageStateName(PageState state);

class Page {
 public:
  // A new tail in a frame of its own.
  static Page NewTail(PageId id, uint32_t group, std::string tenant, FrameId frame, uint32_t depth,
                      std::optional<PageId> parent);
  // A full, keyed page that so far only the store has.
  static Page NewStored(PageId id, uint32_t group, std::string tenant, uint32_t rows,
                        uint32_t depth, std::optional<PageId> parent, const PrefixKey& prefix,
                        const PrefixKey& parent_prefix, const PageKey& store_key,
                        const Checksum128& checksum);
  // What the store's copy of a page is called, and what it must be.
  struct StoredAs {
    PageKey key;
    // Of the stored body, which is the frame's bytes unless the group has cold types.
    Checksum128 checksum;
    // The record belongs to saved state or is named by its content: others may stand behind it, so
    // it is not deleted with this page.
    bool is_shared = false;
  };
  // A private page that so far only the store has, as saved state refers to it. It is immutable,
  // whether `rows` fill it or not: who writes behind its rows copies them first.
  static Page NewSealed(PageId id, uint32_t group, std::string tenant, uint32_t rows,
                        uint32_t depth, std::optional<PageId> parent, const StoredAs& stored);

  // --- copies ---
  void BeginSpill();
  // `stored`: the store took it, or had it already, under `key` with a body of `checksum`.
  void FinishSpill(const std::optional<StoredAs>& stored);
  // Leaves the frame, which the caller releases. Only when resident, stored and unpinned.
  FrameId DropFrame();
  void BeginRestore(FrameId frame);
  // The verified bytes of the store's copy are in the frame, or what they were converted to, whose
  // checksum is `converted` then.
  void FinishRestore(const std::optional<Checksum128>& converted = std::nullopt);
  // The store did not answer: back to stored; the caller releases the returned frame.
  FrameId AbortRestore();
  // Wrong or missing bytes. Returns the frame it held, if any, for release, unless somebody has it
  // pinned and may be reading it: then it has its frame until ReleaseQuarantined.
  std::optional<FrameId> Quarantine();
  // The last pin is gone. Only of a quarantined page that has a frame.
  FrameId ReleaseQuarantined();

  // --- content ---
  // The owner is about to write rows behind rows(): the store's copy no longer stands for the page.
  // Returns the private key to delete from the store, if there was one.
  std::optional<PageKey> BeginWrite();
  // A tail's committed rows, up or (rewind) down.
  void SetRows(uint32_t rows);
  // A save put it into the store. Only immutable, resident pages.
  void SetStored(const StoredAs& stored);
  // From here on a tail never changes, as if it were full: a checkpoint holds it. Not while
  // somebody writes rows behind those there: such a page has an owner beside the checkpoint, and so
  // is copied by whoever writes next.
  void Seal();
  // A write into it is open, or about to be.
  void SetBeingWritten(bool is_being_written) { is_being_written_ = is_being_written; }
  // The last row arrived: immutable from here on.
  void SetFull(uint32_t rows, const Checksum128& checksum);
  void SetKey(const PrefixKey& prefix, const PrefixKey& parent_prefix, const PageKey& store_key);

  // Which page of its sequence it is, of one that was made before that was known.
  void SetDepth(uint32_t depth) { depth_ = depth; }
  // The page in front of it gave way to another that holds the same rows.
  void SetParent(PageId parent) { parent_ = parent; }

  // Its bytes must not outlive its last owner.
  void SetScrub() { is_scrub_ = true; }
  // Nobody finds it any more: it goes when the copy that is in flight ends.
  void Hide() { is_hidden_ = true; }

  // --- owners ---
  void Ref() { ++refs_; }
  // True when that was the last.
  bool Unref();
  void Pin() { ++pins_; }
  bool Unpin();

  PageId id() const { return id_; }
  uint32_t group() const { return group_; }
  const std::string& tenant() const { return tenant_; }
  PageState state() const { return state_; }
  // A quarantined page has one as long as somebody who pinned it before reads it.
  bool has_frame() const {
    return state_ == PageState::kResident || state_ == PageState::kSpilling ||
           state_ == PageState::kRestoring || keeps_frame_;
  }
  bool is_readable() const {
    return state_ == PageState::kResident || state_ == PageState::kSpilling;
  }
  FrameId frame() const { return frame_; }
  uint32_t rows() const { return rows_; }
  // Most rows the page ever had committed: slots below it may still be read by someone who pins it.
  uint32_t high_water_rows() const { return high_water_rows_; }
  // Immutable: every slot is written, or the page was sealed with fewer rows.
  bool is_full() const { return is_full_; }
  bool is_being_written() const { return is_being_written_; }
  bool is_keyed() const { return prefix_.has_value(); }
  bool is_scrub() const { return is_scrub_; }
  bool is_hidden() const { return is_hidden_; }
  const std::optional<PrefixKey>& prefix() const { return prefix_; }
  const PrefixKey& parent_prefix() const { return parent_prefix_; }
  // Set when full: of the bytes in the frame. A page sealed here has none until it is stored.
  const std::optional<Checksum128>& checksum() const { return checksum_; }
  // The store has these rows.
  bool is_stored() const { return stored_.has_value(); }
  const std::optional<StoredAs>& stored() const { return stored_; }
  // Worth keeping without references: others may ask for it, by prefix or by content.
  bool is_findable() const {
    return !is_scrub_ && !is_hidden_ && (is_keyed() || (stored_ && stored_->is_shared));
  }
  // The key to spill a keyed page under.
  const std::optional<PageKey>& page_key() const { return page_key_; }
  uint32_t refs() const { return refs_; }
  uint32_t pins() const { return pins_; }
  uint32_t depth() const { return depth_; }
  const std::optional<PageId>& parent() const { return parent_; }
  // Does nobody here need the bytes in its frame? Then it may be evicted.
  bool is_clean() const { return is_stored() || refs_ == 0; }

 private:
  Page() = default;

  PageId id_;
  uint32_t group_ = 0;
  std::string tenant_;
  PageState state_ = PageState::kResident;
  FrameId frame_;
  uint32_t rows_ = 0;
  uint32_t high_water_rows_ = 0;
  bool is_full_ = false;
  bool is_being_written_ = false;
  bool is_scrub_ = false;
  bool is_hidden_ = false;
  bool keeps_frame_ = false;  // though it is quarantined
  std::optional<PrefixKey> prefix_;
  PrefixKey parent_prefix_;
  std::optional<PageKey> page_key_;
  std::optional<Checksum128> checksum_;
  std::optional<StoredAs> stored_;
  uint32_t refs_ = 0;
  uint32_t pins_ = 0;
  uint32_t depth_ = 0;
  std::optional<PageId> parent_;
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_PAGE_H_
