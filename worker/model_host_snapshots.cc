// Saved state on its way out: a sequence's pages, sealed and put into the store, for a manifest.
#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "worker/cold_rows.h"
#include "worker/model_host_impl.h"

namespace pagetide {
namespace {

// Bodies that a transfer has in memory at a time, unless one page is larger.
constexpr uint64_t kMaxReadBytes = uint64_t{32} << 20;

absl::Status PrefixLost(absl::string_view what) {
  return WithReason(absl::FailedPreconditionError(absl::StrCat("save: ", what)), "PREFIX_LOST");
}

}  // namespace

class ModelHostImpl::SnapshotImpl final : public PagedSnapshot {
 public:
  SnapshotImpl(ModelHostImpl* host, const Tenant& tenant) : host_(host), tenant_(tenant) {}

  ~SnapshotImpl() override {
    {
      MutexLock lock(&host_->mu_);
      for (const Item& item : items_) {
        Page& page = host_->pages_.Get(item.page);
        if (item.is_pinned) host_->pages_.Unpin(page);
        host_->pages_.Unref(host_->pages_.Get(item.page));
      }
      host_->changed_.SignalAll();
    }
    host_->Flush();
  }

  const SessionState& state() const override { return state_; }

  // Copies what the sequence is now, cut to `length`. Once, before anything else, under the host's
  // mutex.
  void Take(const Sequence& sequence, uint64_t length, CheckpointScope scope) {
    host_->mu_.AssertHeld();
    const Model& model = *host_->model_;
    state_.tenant = sequence.tenant;
    state_.model_name = model.spec().name;
    state_.model_digest = model.digest();
    state_.model_identity = model.identity();
    state_.page_tokens = host_->page_tokens();
    state_.canonical_length = std::min(length, sequence.canonical_rows());
    // Canonical rows are at the positions that their indices say.
    if (!sequence.positions.empty() && state_.canonical_length < length) {
      state_.positions.assign(sequence.positions.begin(), sequence.positions.begin() + length);
    }
    state_.tokens.assign(sequence.tokens.begin(), sequence.tokens.begin() + length);
    for (const PositionedInput& input : sequence.inputs) {
      if (input.position < length) state_.inputs.push_back(input);
    }
    state_.groups.resize(host_->num_groups());
    absl::flat_hash_map<PageId, uint32_t> index_of;
    for (uint32_t g = 0; g < host_->num_groups(); ++g) {
      state_.fingerprints.push_back(host_->Geometry(g).fingerprint());
      if (!host_->IsKept(scope, g)) continue;
      // What no later token can attend to is not saved, but for the last rows.
      const int64_t next = length == 0 ? 0 : sequence.position(length - 1) + 1;
      const uint64_t masked = sequence.MaskedRows(host_->traits_[g], next);
      const uint64_t kept = sequence.KeptRows(host_->traits_[g]);
      for (const Extent& extent : sequence.tables[g].Cover(0, length)) {
        if (extent.end_row() <= masked && extent.first_row >= kept && extent.end_row() < length) {
          continue;
        }
        const auto [it, is_new] =
            index_of.try_emplace(extent.page, static_cast<uint32_t>(items_.size()));
        if (is_new) Add(g, extent.page);
        Item& item = items_[it->second];
        item.rows = std::max(item.rows, extent.first_slot + extent.count);
        const uint64_t first_row_of_page = uint64_t{DepthOf(extent.page)} * state_.page_tokens;
        item.holds_its_tokens =
            item.holds_its_tokens ||
            (extent.first_slot == 0 && extent.count == state_.page_tokens &&
             extent.first_row == first_row_of_page && extent.end_row() <= state_.canonical_length);
        state_.groups[g].push_back({.page = it->second,
                                    .first_slot = extent.first_slot,
                                    .count = extent.count,
                                    .first_row = extent.first_row,
                                    .shift = extent.shift});
      }
    }
    for (const Item& item : items_) {
      state_.bytes_total += host_->Geometry(item.group).stored_page_bytes();
    }
    put_.bytes_total = state_.bytes_total;
  }

  void SelectRows(uint64_t begin, uint64_t end) override {
    if (!selects_) put_.bytes_total = 0;
    selects_ = true;
    for (const std::vector<SavedExtent>& group : state_.groups) {
      for (const SavedExtent& extent : group) {
        Item& item = items_[extent.page];
        if (extent.first_row >= end || extent.end_row() <= begin || item.is_selected) continue;
        item.is_selected = true;
        put_.bytes_total += host_->Geometry(item.group).stored_page_bytes();
      }
    }
  }

  absl::StatusOr<Put> PutPages(std::span<const PageKey> missing, Durability level,
                               MonotonicTime deadline) override {
    const absl::flat_hash_set<PageKey> lost(missing.begin(), missing.end());
    std::vector<size_t> todo;
    for (size_t i = 0; i < items_.size(); ++i) {
      Item& item = items_[i];
      if (selects_ && !item.is_selected) continue;
      const bool is_lost = item.is_done && lost.contains(item.ref.key);
      if (item.is_done && !is_lost) continue;
      PT_ASSIGN_OR_RETURN(item.is_done, Prepare(item, is_lost, deadline));
      if (!item.is_done) todo.push_back(i);
    }
    absl::Status status;
    const size_t batch = BatchPages();
    for (size_t at = 0; at < todo.size() && status.ok(); at += batch) {
      status =
          PutBatch(std::span(todo).subspan(at, std::min(batch, todo.size() - at)), level, deadline);
    }
    host_->Flush();
    PT_RETURN_IF_ERROR(status);
    put_.pages.clear();
    for (const Item& item : items_) put_.pages.push_back(item.ref);
    return put_;
  }

  absl::StatusOr<std::vector<Copy>> CopyPages(MonotonicTime deadline) override {
    // Tails first, one by one: their pins end before this call waits for more than one frame.
    std::vector<std::vector<size_t>> batches;
    std::vector<size_t> others;
    for (size_t i = 0; i < items_.size(); ++i) {
      if (items_[i].is_pinned) {
        batches.push_back({i});
      } else {
        others.push_back(i);
      }
    }
    const size_t size = BatchPages();
    for (size_t at = 0; at < others.size(); at += size) {
      const auto end = others.begin() + std::min(at + size, others.size());
      batches.emplace_back(others.begin() + at, end);
    }
    std::vector<Copy> copies(items_.size());
    for (const std::vector<size_t>& batch : batches) {
      PT_RETURN_IF_ERROR(CopyBatch(batch, copies, deadline));
    }
    host_->Flush();
    return copies;
  }

  uint32_t num_pages() const override { return static_cast<uint32_t>(items_.size()); }
  uint32_t GroupOf(uint32_t page) const override { return items_[page].group; }

  absl::StatusOr<Copy> DescribePage(uint32_t i, MonotonicTime deadline) override {
    Item& item = items_[i];
    // As it was taken: what was appended since may have filled the page, with rows of which the
    // state says nothing.
    const bool is_tail = item.is_pinned;
    {
      MutexLock lock(&host_->mu_);
      const Page& page = host_->pages_.Get(item.page);
      if (page.state() == PageState::kQuarantined) return PrefixLost("a page's bytes were lost");
      const bool is_named =
          page.is_keyed() || (page.is_stored() && page.checksum() == page.stored()->checksum);
      // What the store has of rows of colder types is not what is in frames.
      if (!is_tail && page.checksum() && is_named &&
          !host_->Geometry(item.group).has_cold_types()) {
        return Copy{
            .ref = {page.is_keyed() ? *page.page_key() : page.stored()->key, *page.checksum()},
            .rows = host_->page_tokens(),
            .is_full = true};
      }
    }
    copies_.resize(items_.size());
    const size_t batch[] = {i};
    PT_RETURN_IF_ERROR(CopyBatch(batch, copies_, deadline));
    Copy& copy = copies_[i];
    // The rows of a tail may not stay what they are.
    if (is_tail) item.body = std::move(copy.body);
    copy.body = {};
    return copy;
  }

  absl::Status ReadPages(std::span<const uint32_t> pages, MonotonicTime deadline,
                         CopySink sink) override {
    copies_.resize(items_.size());
    absl::Status status;
    while (!pages.empty() && status.ok()) {
      size_t count = 0;
      uint64_t bytes = 0;
      std::vector<size_t> batch;
      for (; count < std::min(pages.size(), BatchPages()); ++count) {
        bytes += host_->Geometry(items_[pages[count]].group).page_bytes();
        if (count > 0 && bytes > kMaxReadBytes) break;
        if (items_[pages[count]].body.empty()) batch.push_back(pages[count]);
      }
      if (!batch.empty()) status = CopyBatch(batch, copies_, deadline);
      for (size_t n = 0; n < count && status.ok(); ++n) {
        const Item& item = items_[pages[n]];
        Copy& copy = copies_[pages[n]];
        status = sink(pages[n], copy.ref, item.body.empty() ? copy.body : item.body);
      }
      for (size_t i : batch) copies_[i].body = {};
      pages = pages.subspan(count);
    }
    host_->Flush();
    return status;
  }

  bool IsInFrame(uint32_t page, const Checksum128& checksum) override {
    MutexLock lock(&host_->mu_);
    return page < items_.size() && IsWholeInFrame(items_[page], checksum);
  }

  absl::Status VisitFrame(uint32_t i, const Checksum128& checksum,
                          OutgoingSequence::FrameSink sink) override {
    CollectiveBuffer frame;
    {
      MutexLock lock(&host_->mu_);
      if (i >= items_.size() || !IsWholeInFrame(items_[i], checksum)) {
        return WithReason(absl::FailedPreconditionError(
                              absl::StrCat("send page ", i, ": it is not whole in a frame")),
                          "NOT_IN_FRAME");
      }
      const Item& item = items_[i];
      Page& page = host_->pages_.Get(item.page);
      host_->pages_.Pin(page);
      frame = CollectiveBuffer::Of(host_->pool_.get(), host_->FrameOffset(item.group, page.frame()),
                                   host_->Geometry(item.group).page_bytes());
    }
    const absl::Status status = sink(i, frame);
    {
      MutexLock lock(&host_->mu_);
      host_->pages_.Unpin(host_->pages_.Get(items_[i].page));
      host_->changed_.SignalAll();
    }
    host_->Flush();
    return status;
  }

 private:
  struct Item {
    PageId page;  // referenced
    uint32_t group = 0;
    uint32_t rows = 0;       // leading rows that the snapshot needs
    bool is_pinned = false;  // a tail: its committed rows stay while somebody pins it
    bool is_done = false;    // `ref` names a record that the store has
    // It is the whole page that its depth says of the canonical rows: those tokens are its tokens.
    bool holds_its_tokens = false;
    bool is_selected = false;
    ManifestPageRef ref;
    std::vector<std::byte> body;  // of a tail, copied out; empty slots are zero
  };
  // A page of a batch, as the store is to know it.
  struct Outgoing {
    size_t item = 0;
    uint64_t offset = 0;
    std::optional<Checksum128> expected;
    PageRecordMeta meta;
    std::span<const std::byte> body;
    std::vector<std::byte> buffer;
    uint32_t sealed_rows = 0;  // of a tail that a checkpoint sealed; 0: the frame is the body
    std::optional<PageKey> stored_key;  // of a private page whose record holds the frame's bytes
  };

  // All slots are written, and nobody writes to it any more. A tail that was sealed has no
  // checksum: behind its rows lies what its frame held before.
  bool IsWholeInFrame(const Item& item, const Checksum128& checksum) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(host_->mu_) {
    const Page& page = host_->pages_.Get(item.page);
    return item.body.empty() && !item.is_pinned && page.is_full() && page.is_readable() &&
           page.checksum() == checksum;
  }

  // A pool may be smaller than a batch.
  size_t BatchPages() const { return std::min<size_t>(kBatchPages, host_->num_frames_); }

  uint32_t DepthOf(PageId id) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(host_->mu_) {
    return host_->pages_.Get(id).depth();
  }

  void Add(uint32_t group, PageId id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(host_->mu_) {
    Page& page = host_->pages_.Get(id);
    host_->pages_.Ref(page);
    Item& item = items_.emplace_back();
    item.page = id;
    item.group = group;
    item.is_pinned = !page.is_full();
    if (item.is_pinned) host_->pages_.Pin(page);
  }

  // Finds out whether the store has the page already (true), and copies the rows of a tail out, so
  // that its pin ends before this call waits for frames.
  absl::StatusOr<bool> Prepare(Item& item, bool is_lost, MonotonicTime deadline) {
    MutexLock lock(&host_->mu_);
    Page& page = host_->pages_.Get(item.page);
    // A copy under way is about to say where the page is: wait rather than send it twice.
    while (page.state() == PageState::kRestoring || page.state() == PageState::kSpilling) {
      const absl::Duration left = deadline - host_->clock_->MonotonicNow();
      if (left <= absl::ZeroDuration()) {
        return absl::DeadlineExceededError("save: a page is still being copied");
      }
      host_->changed_.WaitWithTimeout(&host_->mu_, std::min(left, kLookAgain));
    }
    if (!item.body.empty()) return false;
    if (page.state() == PageState::kQuarantined) return PrefixLost("a page's bytes were lost");
    const bool is_in_store = page.is_stored() && !is_lost;
    // The spilled record of a tail stands for it too, until somebody writes to the tail again.
    if (is_in_store && (page.is_full() ? page.is_findable() : !page.is_readable())) {
      item.ref = {page.stored()->key, page.stored()->checksum};
      return true;
    }
    if (!page.is_readable() && is_lost) return PrefixLost("the store has lost a page");
    if (!item.is_pinned) return false;
    if (page.is_full()) {  // it filled up meanwhile
      host_->pages_.Unpin(page);
      item.is_pinned = false;
      return false;
    }
    const uint64_t offset = host_->FrameOffset(item.group, page.frame());
    host_->mu_.Unlock();
    absl::StatusOr<std::vector<std::byte>> body = CopyRows(item.group, offset, item.rows);
    host_->mu_.Lock();
    PT_RETURN_IF_ERROR(body.status());
    item.body = *std::move(body);
    host_->pages_.Unpin(host_->pages_.Get(item.page));
    item.is_pinned = false;
    host_->changed_.SignalAll();
    return false;
  }

  // The first `rows` rows of a page; the slots behind them are zero, so that equal rows are equal
  // bytes.
  absl::StatusOr<std::vector<std::byte>> CopyRows(uint32_t group, uint64_t offset, uint32_t rows) {
    const GroupGeometry& geometry = host_->Geometry(group);
    std::vector<std::byte> body(geometry.page_bytes());
    if (!geometry.has_rows()) {
      PT_RETURN_IF_ERROR(host_->pool_->Read(offset, body));
      return body;
    }
    for (uint32_t layer = 0; layer < geometry.num_layers(); ++layer) {
      for (RowKind kind : {RowKind::kK, RowKind::kV}) {
        const uint64_t bytes = uint64_t{rows} * geometry.row_bytes(kind);
        const uint64_t at = geometry.RowOffset(layer, kind, 0);
        if (bytes == 0) continue;
        PT_RETURN_IF_ERROR(host_->pool_->Read(offset + at, std::span(body).subspan(at, bytes)));
      }
    }
    return body;
  }

  absl::Status CopyBatch(std::span<const size_t> batch, std::vector<Copy>& copies,
                         MonotonicTime deadline) {
    Acquired got;
    std::vector<Outgoing> out;
    {
      MutexLock lock(&host_->mu_);
      Need need;
      need.fresh.assign(host_->num_groups(), 0);
      for (size_t i : batch) need.pages.push_back(items_[i].page);
      PT_RETURN_IF_ERROR(host_->Acquire(tenant_.name, need, deadline, &got));
      for (size_t i : batch) {
        out.push_back(Describe(i));
        // A tail may have filled up behind the rows that are the state's.
        if (items_[i].is_pinned) out.back().expected.reset();
      }
    }
    absl::Status status;
    for (Outgoing& page : out) {
      Item& item = items_[page.item];
      Copy& copy = copies[page.item];
      copy.is_full = page.expected.has_value();
      copy.rows = copy.is_full                              ? host_->page_tokens()
                  : page.sealed_rows > 0 && !item.is_pinned ? page.sealed_rows
                                                            : item.rows;
      auto body = CopyRows(item.group, page.offset, copy.rows);
      status = body.status();
      if (!status.ok()) break;
      copy.body = *std::move(body);
      copy.ref.checksum = ChecksumOf(copy.body);
      if (page.expected && *page.expected != copy.ref.checksum) {
        status =
            absl::DataLossError(absl::StrCat("copy a page: checksum 0x", copy.ref.checksum.ToHex(),
                                             " != 0x", page.expected->ToHex()));
        break;
      }
      if (copy.is_full && (page.meta.prefix || page.stored_key)) {
        copy.ref.key = page.meta.prefix ? page.meta.key : *page.stored_key;
      } else {
        copy.ref.key =
            MakeContentPageKey(tenant_.salt, page.meta.fingerprint, copy.rows, copy.body);
      }
    }
    MutexLock lock(&host_->mu_);
    for (const Outgoing& page : out) {
      Item& item = items_[page.item];
      if (!item.is_pinned) continue;
      host_->pages_.Unpin(host_->pages_.Get(item.page));
      item.is_pinned = false;
    }
    if (got.fresh.empty()) got.fresh.resize(host_->num_groups());
    host_->ReleaseAcquired(got);
    return status;
  }

  absl::Status PutBatch(std::span<const size_t> batch, Durability level, MonotonicTime deadline) {
    Acquired got;
    std::vector<Outgoing> out;
    {
      MutexLock lock(&host_->mu_);
      Need need;
      need.fresh.assign(host_->num_groups(), 0);
      for (size_t i : batch) {
        if (items_[i].body.empty()) need.pages.push_back(items_[i].page);
      }
      if (!need.pages.empty()) {
        PT_RETURN_IF_ERROR(host_->Acquire(tenant_.name, need, deadline, &got));
      }
      for (size_t i : batch) out.push_back(Describe(i));
    }
    const absl::Status status = SendBatch(out, level, deadline);
    {
      MutexLock lock(&host_->mu_);
      for (const Outgoing& page : out) {
        if (!status.ok()) break;
        Remember(page);
      }
      if (got.fresh.empty()) got.fresh.resize(host_->num_groups());
      host_->ReleaseAcquired(got);
    }
    return status;
  }

  Outgoing Describe(size_t i) ABSL_EXCLUSIVE_LOCKS_REQUIRED(host_->mu_) {
    const Item& item = items_[i];
    const Page& page = host_->pages_.Get(item.page);
    const GroupGeometry& geometry = host_->Geometry(item.group);
    Outgoing out;
    out.item = i;
    out.meta.body_bytes = geometry.stored_page_bytes();
    out.meta.fingerprint = geometry.fingerprint();
    out.meta.numerics_id = host_->model_->spec().numerics_id;
    out.meta.group = item.group;
    out.meta.depth = page.depth();
    if (!item.body.empty()) return out;
    out.offset = host_->FrameOffset(item.group, page.frame());
    out.expected = page.checksum();
    if (!page.checksum()) out.sealed_rows = page.rows();
    if (page.is_stored() && page.checksum() == page.stored()->checksum) {
      out.stored_key = page.stored()->key;
    }
    if (page.is_keyed()) {
      out.meta.key = *page.page_key();
      out.meta.prefix = page.prefix();
      out.meta.parent = page.parent_prefix();
    }
    return out;
  }

  // Fills in keys and checksums, asks which of them the store has, and sends the others.
  absl::Status SendBatch(std::vector<Outgoing>& out, Durability level, MonotonicTime deadline) {
    std::vector<PageKey> keys;
    for (Outgoing& page : out) {
      Item& item = items_[page.item];
      if (!item.body.empty()) {
        page.body = item.body;
      } else if (page.sealed_rows > 0) {
        PT_ASSIGN_OR_RETURN(page.buffer, CopyRows(item.group, page.offset, page.sealed_rows));
        page.body = page.buffer;
      } else {
        PT_ASSIGN_OR_RETURN(page.body, host_->PageBytes(item.group, page.offset, page.buffer));
      }
      page.meta.checksum = ChecksumOf(page.body);
      if (page.expected && *page.expected != page.meta.checksum &&
          !host_->options_.unsafe_skip_verify) {
        return absl::DataLossError(absl::StrCat("save a page: checksum 0x",
                                                page.meta.checksum.ToHex(), " != 0x",
                                                page.expected->ToHex()));
      }
      if (const GroupGeometry& group = host_->Geometry(item.group); group.has_cold_types()) {
        std::vector<std::byte> cold(group.stored_page_bytes());
        EncodeColdPage(group, page.body, cold);
        page.buffer = std::move(cold);
        page.body = page.buffer;
        page.meta.checksum = ChecksumOf(page.body);
      }
      if (!page.meta.prefix) {
        const uint32_t rows = !item.body.empty()     ? item.rows
                              : page.sealed_rows > 0 ? page.sealed_rows
                                                     : host_->page_tokens();
        page.meta.key = MakeContentPageKey(tenant_.salt, page.meta.fingerprint, rows, page.body);
      }
      keys.push_back(page.meta.key);
    }
    PT_ASSIGN_OR_RETURN(const std::vector<LookupResult> there,
                        host_->store_->LookupPages(keys, deadline));
    std::vector<PutPage> puts;
    std::vector<size_t> put_of;
    for (size_t i = 0; i < out.size(); ++i) {
      Item& item = items_[out[i].item];
      item.ref = {out[i].meta.key, out[i].meta.checksum};
      if (there[i].present && there[i].body_bytes == out[i].meta.body_bytes) {
        // Of a keyed page the first committed body stands, whoever wrote it.
        item.ref.checksum = there[i].checksum;
        continue;
      }
      puts.push_back({out[i].meta, out[i].body, TokensOf(item, out[i].meta)});
      put_of.push_back(i);
    }
    if (puts.empty()) return absl::OkStatus();
    const std::vector<PutPageResult> results = host_->store_->PutPages(puts, level, deadline);
    for (size_t p = 0; p < puts.size(); ++p) {
      PT_RETURN_IF_ERROR(p < results.size() ? results[p].status
                                            : absl::InternalError("store gave no result"));
      items_[out[put_of[p]].item].ref.checksum = results[p].checksum;
      if (results[p].already_present) continue;
      ++put_.pages_written;
      put_.bytes_written += puts[p].body.size();
    }
    return absl::OkStatus();
  }

  // The tokens by which others may find part of a keyed page; none for pages with other inputs, or
  // whose tokens this sequence, edited, does not have in their place.
  std::span<const uint32_t> TokensOf(const Item& item, const PageRecordMeta& meta) const {
    const uint64_t begin = uint64_t{meta.depth} * host_->page_tokens();
    const uint64_t end = begin + host_->page_tokens();
    if (!meta.prefix || !item.holds_its_tokens || host_->traits_[item.group].is_whole ||
        host_->page_tokens() > kMaxIndexedPageTokens ||
        std::any_of(state_.inputs.begin(), state_.inputs.end(), [&](const PositionedInput& input) {
          return input.position >= begin && input.position < end;
        })) {
      return {};
    }
    return std::span(state_.tokens).subspan(begin, host_->page_tokens());
  }

  void Remember(const Outgoing& out) ABSL_EXCLUSIVE_LOCKS_REQUIRED(host_->mu_) {
    Item& item = items_[out.item];
    item.is_done = true;
    const GroupGeometry& geometry = host_->Geometry(item.group);
    host_->counters_.bytes_verified += geometry.page_bytes();
    if (geometry.has_cold_types()) host_->counters_.bytes_converted_cold += geometry.page_bytes();
    Page& page = host_->pages_.Get(item.page);
    if (item.body.empty() && page.is_full() && page.state() == PageState::kResident) {
      host_->pages_.SetStored(page, {item.ref.key, item.ref.checksum, /*is_shared=*/true});
    }
  }

  ModelHostImpl* const host_;
  const Tenant tenant_;
  SessionState state_;
  std::vector<Item> items_;
  bool selects_ = false;  // some items only
  Put put_;
  std::vector<Copy> copies_;  // [item] of DescribePage and ReadPages; bodies only meanwhile
};

absl::StatusOr<std::unique_ptr<ModelHostImpl::PagedSnapshot>> ModelHostImpl::TakeSnapshot(
    const Tenant& tenant, const Sequence& sequence, std::optional<uint64_t> length,
    CheckpointScope scope) {
  const uint64_t rows = length.value_or(sequence.length());
  if (rows > sequence.length()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "save: keep_tokens = ", rows, " is above the sequence's length ", sequence.length()));
  }
  if (const auto lacked = sequence.LackedAt(traits_, rows)) {
    return RowsLacking(absl::StrCat("save the first ", rows, " rows"), *lacked);
  }
  auto snapshot = std::make_unique<SnapshotImpl>(this, tenant);
  snapshot->Take(sequence, rows, scope);
  return std::unique_ptr<PagedSnapshot>(std::move(snapshot));
}

absl::StatusOr<std::unique_ptr<StateSnapshot>> ModelHostImpl::Snapshot(
    const Tenant& tenant, const SequenceHandle& handle, std::optional<uint64_t> length) {
  if (store_ == nullptr) {
    return WithReason(absl::FailedPreconditionError("save: this worker has no store"), "NO_STORE");
  }
  MutexLock lock(&mu_);
  PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindSequence(tenant, handle.id));
  PT_RETURN_IF_ERROR(CheckHandle(*sequence, handle));
  if (!sequence->pending) PT_RETURN_IF_ERROR(CutIfLost(*sequence));
  // Saved here, it would be older than what its next owner has.
  if (sequence->pending && sequence->pending->is_hold()) {
    PT_RETURN_IF_ERROR(CheckMayChange("save: ", *sequence));
  }
  return TakeSnapshot(tenant, *sequence, length, CheckpointScope::kAll);
}

}  // namespace pagetide
