// Transfers of pages between frames and the store: spills and restores, in batches, on the I/O
// threads. What they find is verified before anybody sees it.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "worker/cold_rows.h"
#include "worker/model_host_impl.h"

namespace pagetide {

void ModelHostImpl::StartSpills(const std::vector<PageId>& ids, Durability level) {
  std::vector<SpillItem> batch;
  const auto schedule = [&]() {
    mu_.AssertHeld();
    if (batch.empty()) return;
    ++jobs_in_flight_;
    const absl::Status scheduled =
        io_->Schedule([this, level, items = batch] { RunSpills(items, level); });
    if (!scheduled.ok()) {
      --jobs_in_flight_;
      for (const SpillItem& item : batch) {
        --num_spilling_[item.group];
        pages_.FinishSpill(pages_.Get(item.page), std::nullopt);
      }
    }
    batch.clear();
  };
  for (PageId id : ids) {
    Page& page = pages_.Get(id);
    SpillItem item;
    item.page = id;
    item.group = page.group();
    item.offset = FrameOffset(page.group(), page.frame());
    item.key = page.is_keyed() ? *page.page_key()
                               : MakePrivatePageKey(options_.incarnation, id.value(), NextNumber());
    if (page.is_full()) item.expected = page.checksum();
    item.meta.key = item.key;
    item.meta.body_bytes = Geometry(item.group).stored_page_bytes();
    item.meta.fingerprint = Geometry(item.group).fingerprint();
    item.meta.numerics_id = model_->spec().numerics_id;
    item.meta.group = item.group;
    item.meta.depth = page.depth();
    if (page.is_keyed()) {
      item.meta.prefix = page.prefix();
      item.meta.parent = page.parent_prefix();
      item.tokens = pages_.index(item.group).TokensOf(id);
    }
    pages_.BeginSpill(page);
    ++num_spilling_[item.group];
    batch.push_back(std::move(item));
    if (batch.size() == kBatchPages) schedule();
  }
  schedule();
}

void ModelHostImpl::RunSpills(const std::vector<SpillItem>& items, Durability level) {
  // A page being spilled is neither written nor evicted, so its frame is read without the lock.
  std::vector<std::vector<std::byte>> buffers(items.size());
  std::vector<PutPage> puts;
  std::vector<size_t> put_of;  // index into items
  std::vector<bool> is_damaged(items.size(), false);
  for (size_t i = 0; i < items.size(); ++i) {
    const auto bytes = PageBytes(items[i].group, items[i].offset, buffers[i]);
    if (!bytes.ok()) continue;
    const Checksum128 checksum = ChecksumOf(*bytes);
    if (items[i].expected && checksum != *items[i].expected && !options_.unsafe_skip_verify) {
      is_damaged[i] = true;
      continue;
    }
    PutPage put{items[i].meta, *bytes};
    if (items[i].tokens != nullptr && items[i].tokens->size() <= kMaxIndexedPageTokens) {
      put.tokens = *items[i].tokens;
    }
    put.meta.checksum = checksum;
    if (const GroupGeometry& group = Geometry(items[i].group); group.has_cold_types()) {
      std::vector<std::byte> cold(group.stored_page_bytes());
      EncodeColdPage(group, *bytes, cold);
      buffers[i] = std::move(cold);
      put.body = buffers[i];
      put.meta.checksum = ChecksumOf(put.body);
    }
    puts.push_back(std::move(put));
    put_of.push_back(i);
  }
  std::vector<PutPageResult> results;
  if (!puts.empty()) {
    results = store_->PutPages(puts, level, clock_->MonotonicNow() + options_.store_timeout);
  }
  {
    MutexLock lock(&mu_);
    std::vector<std::optional<Page::StoredAs>> stored(items.size());
    std::vector<absl::Status> refused(puts.size());
    const uint64_t taken_before = puts_taken_;
    for (size_t p = 0; p < puts.size(); ++p) {
      absl::Status status =
          p < results.size() ? results[p].status : absl::InternalError("store gave no result");
      // Two honest writers of one keyed page may differ in bits; of a private page there is one
      // writer.
      if (status.ok() && !puts[p].meta.prefix && results[p].checksum != puts[p].meta.checksum) {
        status = absl::InternalError(
            absl::StrCat("spill a private page: the store holds ", results[p].checksum.ToHex(),
                         " under its key, not ", puts[p].meta.checksum.ToHex()));
      }
      if (!status.ok()) {
        refused[p] = std::move(status);
        continue;
      }
      NotePutTaken(items[put_of[p]].page);
      stored[put_of[p]] = Page::StoredAs{items[put_of[p]].key, results[p].checksum};
      const GroupGeometry& group = Geometry(items[put_of[p]].group);
      counters_.bytes_verified += group.page_bytes();
      if (group.has_cold_types()) counters_.bytes_converted_cold += group.page_bytes();
      if (level == Durability::kCache)
        ++counters_.pages_spilled;
      else
        ++counters_.pages_written_through;
    }
    for (size_t p = 0; p < puts.size(); ++p) {
      if (!refused[p].ok()) NotePutRefused(items[put_of[p]].page, taken_before, refused[p]);
    }
    for (size_t i = 0; i < items.size(); ++i) {
      Page& page = pages_.Get(items[i].page);
      --num_spilling_[items[i].group];
      pages_.FinishSpill(page, stored[i]);
      if (is_damaged[i]) {
        ++counters_.checksum_failures;
        if (Page* still = pages_.Find(items[i].page)) pages_.Quarantine(*still);
      }
    }
    changed_.SignalAll();
  }
  FinishJob();
}

void ModelHostImpl::FinishJob() {
  Flush();
  // Last of all: from here on the host may be destroyed.
  MutexLock lock(&mu_);
  --jobs_in_flight_;
  changed_.SignalAll();
}

void ModelHostImpl::StartRestores(const std::vector<PageId>& ids) {
  for (size_t at = 0; at < ids.size(); at += kBatchPages) {
    std::vector<RestoreItem> batch;
    for (size_t i = at; i < std::min(ids.size(), at + kBatchPages); ++i) {
      const Page& page = pages_.Get(ids[i]);
      batch.push_back({ids[i], page.group(), FrameOffset(page.group(), page.frame()),
                       page.stored()->key, page.stored()->checksum});
    }
    ++jobs_in_flight_;
    const absl::Status scheduled = io_->Schedule([this, batch] { RunRestores(batch); });
    if (scheduled.ok()) continue;
    --jobs_in_flight_;
    last_store_error_ = scheduled;
    for (const RestoreItem& item : batch) pages_.AbortRestore(pages_.Get(item.page));
  }
}

void ModelHostImpl::RunRestores(const std::vector<RestoreItem>& items) {
  // Nobody reads a frame that is being restored, so it is filled without the lock.
  std::byte* const view = pool_->host_view();
  std::vector<std::vector<std::byte>> buffers(items.size());
  std::vector<GetPage> gets(items.size());
  uint64_t total_bytes = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    const GroupGeometry& group = Geometry(items[i].group);
    const uint64_t size = group.stored_page_bytes();
    total_bytes += size;
    gets[i].key = items[i].key;
    const bool is_direct = view != nullptr && !group.has_cold_types();
    if (!is_direct) buffers[i].resize(size);
    gets[i].body = is_direct ? std::span(view + items[i].offset, size) : std::span(buffers[i]);
    if (!options_.unsafe_skip_verify) gets[i].expected = items[i].expected;
  }
  const MonotonicTime began = clock_->MonotonicNow();
  const std::vector<GetPageResult> results = store_->GetPages(gets, began + options_.store_timeout);
  const absl::Duration took = clock_->MonotonicNow() - began;

  std::vector<absl::Status> failed(items.size());
  std::vector<bool> is_lost(items.size(), false);
  std::vector<bool> is_damaged(items.size(), false);
  std::vector<std::optional<Checksum128>> converted(items.size());
  for (size_t i = 0; i < items.size(); ++i) {
    failed[i] =
        i < results.size() ? results[i].status : absl::InternalError("store gave no result");
    if (!failed[i].ok()) continue;
    if (results[i].outcome != GetOutcome::kHit) {
      is_lost[i] = true;
      is_damaged[i] = results[i].outcome == GetOutcome::kQuarantined;
      continue;
    }
    // The frame's bytes are checked here, whatever the store and the wire checked before.
    if (!options_.unsafe_skip_verify && ChecksumOf(gets[i].body) != items[i].expected) {
      is_lost[i] = is_damaged[i] = true;
      continue;
    }
    const GroupGeometry& group = Geometry(items[i].group);
    if (group.has_cold_types()) {
      std::vector<std::byte> page(view == nullptr ? group.page_bytes() : 0);
      const std::span<std::byte> rows =
          view == nullptr ? std::span(page) : std::span(view + items[i].offset, group.page_bytes());
      DecodeColdPage(group, buffers[i], rows);
      converted[i] = ChecksumOf(rows);
      buffers[i] = std::move(page);
    }
    if (view == nullptr) failed[i] = pool_->Write(items[i].offset, buffers[i]);
  }
  {
    MutexLock lock(&mu_);
    for (size_t i = 0; i < items.size(); ++i) {
      Page& page = pages_.Get(items[i].page);
      if (!failed[i].ok()) {
        ++counters_.store_errors;
        last_store_error_ = failed[i];
        pages_.AbortRestore(page);
      } else if (is_lost[i]) {
        ++counters_.restore_misses;
        if (is_damaged[i]) ++counters_.checksum_failures;
        pages_.Quarantine(page);
      } else {
        ++counters_.pages_restored;
        counters_.bytes_verified += Geometry(items[i].group).stored_page_bytes();
        if (converted[i]) counters_.bytes_converted_back += Geometry(items[i].group).page_bytes();
        pages_.FinishRestore(page, converted[i]);
      }
    }
    store_meter_.Add(static_cast<double>(total_bytes), took);
    changed_.SignalAll();
  }
  FinishJob();
}

}  // namespace pagetide
