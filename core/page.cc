#include "core/page.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace pagetide {

absl::string_view PageStateName(PageState state) {
  switch (state) {
    case PageState::kResident:
      return "resident";
    case PageState::kSpilling:
      return "spilling";
    case PageState::kStored:
      return "stored";
    case PageState::kRestoring:
      return "restoring";
    case PageState::kQuarantined:
      return "quarantined";
  }
  return "unknown";
}

Page Page::NewTail(PageId id, uint32_t group, std::string tenant, FrameId frame, uint32_t depth,
                   std::optional<PageId> parent) {
  Page page;
  page.id_ = id;
  page.group_ = group;
  page.tenant_ = std::move(tenant);
  page.frame_ = frame;
  page.depth_ = depth;
  page.parent_ = parent;
  return page;
}

Page Page::NewStored(PageId id, uint32_t group, std::string tenant, uint32_t rows, uint32_t depth,
                     std::optional<PageId> parent, const PrefixKey& prefix,
                     const PrefixKey& parent_prefix, const PageKey& store_key,
                     const Checksum128& checksum) {
  Page page;
  page.id_ = id;
  page.group_ = group;
  page.tenant_ = std::move(tenant);
  page.state_ = PageState::kStored;
  page.rows_ = page.high_water_rows_ = rows;
  page.is_full_ = true;
  page.depth_ = depth;
  page.parent_ = parent;
  page.prefix_ = prefix;
  page.parent_prefix_ = parent_prefix;
  page.page_key_ = store_key;
  page.checksum_ = checksum;
  page.stored_ = StoredAs{store_key, checksum, /*is_shared=*/true};
  return page;
}

Page Page::NewSealed(PageId id, uint32_t group, std::string tenant, uint32_t rows, uint32_t depth,
                     std::optional<PageId> parent, const StoredAs& stored) {
  Page page;
  page.id_ = id;
  page.group_ = group;
  page.tenant_ = std::move(tenant);
  page.state_ = PageState::kStored;
  page.rows_ = page.high_water_rows_ = rows;
  page.is_full_ = true;
  page.depth_ = depth;
  page.parent_ = parent;
  page.checksum_ = stored.checksum;
  page.stored_ = stored;
  return page;
}

void Page::BeginSpill() {
  PT_CHECK(state_ == PageState::kResident);
  state_ = PageState::kSpilling;
}

void Page::FinishSpill(const std::optional<StoredAs>& stored) {
  PT_CHECK(state_ == PageState::kSpilling);
  state_ = PageState::kResident;
  if (stored) stored_ = stored;
}

FrameId Page::DropFrame() {
  PT_CHECK(state_ == PageState::kResident && is_stored() && pins_ == 0);
  state_ = PageState::kStored;
  return std::exchange(frame_, FrameId());
}

void Page::BeginRestore(FrameId frame) {
  PT_CHECK(state_ == PageState::kStored);
  state_ = PageState::kRestoring;
  frame_ = frame;
}

void Page::FinishRestore(const std::optional<Checksum128>& converted) {
  PT_CHECK(state_ == PageState::kRestoring);
  state_ = PageState::kResident;
  // Another honest writer's body may have won in the store: these are its bytes now.
  if (is_full_) checksum_ = converted.value_or(stored_->checksum);
}

FrameId Page::AbortRestore() {
  PT_CHECK(state_ == PageState::kRestoring);
  state_ = PageState::kStored;
  return std::exchange(frame_, FrameId());
}

std::optional<FrameId> Page::Quarantine() {
  PT_CHECK(state_ != PageState::kQuarantined);
  std::optional<FrameId> frame;
  keeps_frame_ = is_readable() && pins_ > 0;
  if (has_frame() && !keeps_frame_) frame = std::exchange(frame_, FrameId());
  state_ = PageState::kQuarantined;
  stored_.reset();
  return frame;
}

FrameId Page::ReleaseQuarantined() {
  PT_CHECK(state_ == PageState::kQuarantined && keeps_frame_ && pins_ == 0);
  keeps_frame_ = false;
  return std::exchange(frame_, FrameId());
}

std::optional<PageKey> Page::BeginWrite() {
  PT_CHECK(state_ == PageState::kResident && !is_full_);
  std::optional<PageKey> stale;
  if (stored_ && !stored_->is_shared) stale = stored_->key;
  stored_.reset();
  return stale;
}

void Page::SetRows(uint32_t rows) {
  PT_CHECK(!is_full_);
  rows_ = rows;
  high_water_rows_ = std::max(high_water_rows_, rows);
}

void Page::SetStored(const StoredAs& stored) {
  PT_CHECK(state_ == PageState::kResident && is_full_);
  stored_ = stored;
}

void Page::Seal() {
  PT_CHECK(is_readable() || state_ == PageState::kStored || state_ == PageState::kRestoring);
  PT_CHECK(!is_being_written_);
  is_full_ = true;
}

void Page::SetFull(uint32_t rows, const Checksum128& checksum) {
  PT_CHECK(state_ == PageState::kResident && !is_full_);
  SetRows(rows);
  is_full_ = true;
  checksum_ = checksum;
}

void Page::SetKey(const PrefixKey& prefix, const PrefixKey& parent_prefix,
                  const PageKey& store_key) {
  PT_CHECK(is_full_ && !prefix_);
  prefix_ = prefix;
  parent_prefix_ = parent_prefix;
  page_key_ = store_key;
}

bool Page::Unref() {
  PT_CHECK(refs_ > 0);
  return --refs_ == 0;
}

bool Page::Unpin() {
  PT_CHECK(pins_ > 0);
  return --pins_ == 0;
}

}  // namespace pagetide
