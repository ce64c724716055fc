// A sequence on its way in from another worker: frames for the pages that are not here, filled from
// outside, and the sequence over them. Pages come into being as those of a checkpoint's copy in
// host memory do (model_host_checkpoint_copies.cc); only their bytes take another way.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "worker/model_host_impl.h"

namespace pagetide {
namespace {

// Each page of the list belongs to one layer group and holds all rows that the group says it has.
absl::Status CheckPages(const TransferPlan& plan, uint32_t page_tokens) {
  std::vector<int64_t> group_of(plan.pages.size(), -1);
  for (size_t g = 0; g < plan.state.groups.size(); ++g) {
    for (const SavedExtent& extent : plan.state.groups[g]) {
      if (extent.page >= plan.pages.size()) {
        return absl::InvalidArgumentError(absl::StrCat("state: layer group ", g, " names page ",
                                                       extent.page, " of ", plan.pages.size()));
      }
      int64_t& group = group_of[extent.page];
      if (group >= 0 && group != static_cast<int64_t>(g)) {
        return absl::InvalidArgumentError(
            absl::StrCat("state: page ", extent.page, " is of layer groups ", group, " and ", g));
      }
      group = static_cast<int64_t>(g);
      const uint64_t end_slot = uint64_t{extent.first_slot} + extent.count;
      if (end_slot > plan.pages[extent.page].rows) {
        return absl::InvalidArgumentError(
            absl::StrCat("pages[", extent.page, "].rows is ", plan.pages[extent.page].rows,
                         ", the state has rows up to slot ", end_slot));
      }
    }
  }
  for (size_t p = 0; p < plan.pages.size(); ++p) {
    const TransferPage& page = plan.pages[p];
    if (group_of[p] < 0) {
      return absl::InvalidArgumentError(absl::StrCat("pages[", p, "] is in no layer group"));
    }
    if (page.rows > page_tokens || (page.is_full && page.rows != page_tokens)) {
      return absl::InvalidArgumentError(absl::StrCat("pages[", p, "].rows is ", page.rows,
                                                     page.is_full ? " of a full page" : "",
                                                     ", a page has ", page_tokens));
    }
  }
  return absl::OkStatus();
}

}  // namespace

class ModelHostImpl::IncomingImpl final : public IncomingSequence {
 public:
  // Before the lock of the host is taken.
  IncomingImpl(ModelHostImpl* host, const Tenant& tenant, TransferPlan plan)
      : host_(host), kind_(plan.kind), sequence_(std::make_shared<Sequence>()) {
    if (kind_ == TransferKind::kMove) {
      identity_ = SequenceIdentity{plan.identity.id, plan.identity.epoch + 1};
    }
    saved_.state = std::move(plan.state);
    for (const TransferPage& page : plan.pages) {
      saved_.pages.push_back(page.ref);
      saved_.copies.push_back({.ref = page.ref, .rows = page.rows, .is_full = page.is_full});
    }
    sequence_->tenant = tenant.name;
    sequence_->root = RootPrefixKey(tenant.salt, host_->model_->identity(), host_->page_tokens());
    sequence_->tables.resize(host_->num_groups());
    const SessionState& state = saved_.state;
    keys_ = PrefixKeysOf(sequence_->root, std::span(state.tokens).first(state.canonical_length),
                         host_->page_tokens(), state.inputs);
  }
  ~IncomingImpl() override {
    {
      MutexLock lock(&host_->mu_);
      if (!is_committed_) host_->DropPlan(plan_, got_);
    }
    host_->Flush();
  }

  // Once, before anything else. All frames or none.
  absl::Status Reserve(MonotonicTime deadline) {
    host_->mu_.AssertHeld();
    PT_RETURN_IF_ERROR(CheckRoom());
    plan_ = host_->PlanCopies(sequence_->tenant, saved_, keys_);
    const std::vector<uint32_t>& fresh = plan_.need.fresh;
    // Without anything to wait for it does not stand in line.
    if (std::any_of(fresh.begin(), fresh.end(), [](uint32_t n) { return n > 0; })) {
      PT_RETURN_IF_ERROR(host_->Acquire(sequence_->tenant, plan_.need, deadline, &got_));
    }
    AssignFrames(plan_, got_);
    places_.resize(saved_.pages.size());
    for (const CopiedPage& page : plan_.copied) {
      if (!page.frame) continue;
      const uint64_t bytes = host_->Geometry(page.group).page_bytes();
      places_[page.page] = {.offset = host_->FrameOffset(page.group, *page.frame), .bytes = bytes};
      wanted_.push_back(page.page);
      wanted_bytes_ += bytes;
    }
    std::sort(wanted_.begin(), wanted_.end());
    num_missing_ = wanted_.size();
    return absl::OkStatus();
  }

  std::span<const uint32_t> wanted() const override { return wanted_; }
  uint64_t wanted_bytes() const override { return wanted_bytes_; }
  uint64_t num_missing() const override { return num_missing_; }
  uint64_t num_pages() const override { return saved_.pages.size(); }

  absl::StatusOr<bool> Write(uint32_t page, uint64_t offset,
                             std::span<const std::byte> bytes) override {
    if (page >= places_.size() || places_[page].bytes == 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("page is ", page, ", which was not asked for"));
    }
    Place& place = places_[page];
    if (place.is_there) return false;
    if (offset == 0) {
      page_ = page;
      received_ = 0;
      stream_ = ChecksumStream();
    }
    if (page != page_ || offset != received_ || bytes.empty() ||
        bytes.size() > place.bytes - received_) {
      return absl::InvalidArgumentError(absl::StrCat(
          "bytes [", offset, ", ", offset, " + ", bytes.size(), ") of page ", page, ", which has ",
          place.bytes, "; next are those from ", page == page_ ? received_ : 0, " on"));
    }
    PT_RETURN_IF_ERROR(host_->pool_->Write(place.offset + received_, bytes));
    stream_.Update(bytes);
    received_ += bytes.size();
    if (received_ < place.bytes) return false;
    received_ = 0;
    page_ = kNoPage;
    PT_RETURN_IF_ERROR(Accept(page, stream_.Get()));
    return true;
  }

  absl::Status Fill(uint32_t page, PageFill fill) override {
    if (page >= places_.size() || places_[page].bytes == 0 || places_[page].is_there) {
      return absl::InvalidArgumentError(
          absl::StrCat("page is ", page, ", which was not asked for, or is there"));
    }
    const Place& place = places_[page];
    page_ = kNoPage;
    PT_RETURN_IF_ERROR(fill(CollectiveBuffer::Of(host_->pool_.get(), place.offset, place.bytes)));
    ChecksumStream stream;
    std::vector<std::byte> part(std::min(place.bytes, kVerifyPartBytes));
    for (uint64_t at = 0; at < place.bytes; at += part.size()) {
      const auto some = std::span(part).first(std::min<uint64_t>(part.size(), place.bytes - at));
      PT_RETURN_IF_ERROR(host_->pool_->Read(place.offset + at, some));
      stream.Update(some);
    }
    return Accept(page, stream.Get());
  }

  absl::StatusOr<std::optional<SequenceInfo>> Commit() override {
    if (num_missing_ > 0) {
      const auto first = std::find_if(wanted_.begin(), wanted_.end(),
                                      [&](uint32_t page) { return !places_[page].is_there; });
      return WithReason(absl::FailedPreconditionError(
                            absl::StrCat("commit transfer: ", num_missing_, " of ", wanted_.size(),
                                         " pages have not come, the first is page ", *first)),
                        "PAGES_MISSING",
                        {{"missing", absl::StrCat(num_missing_)}, {"first", absl::StrCat(*first)}});
    }
    absl::StatusOr<std::optional<SequenceInfo>> info;
    {
      MutexLock lock(&host_->mu_);
      info = CommitLocked();
    }
    host_->Flush();
    return info;
  }

 private:
  static constexpr uint32_t kNoPage = ~uint32_t{0};
  static constexpr uint64_t kVerifyPartBytes = uint64_t{4} << 20;
  // Of a page that is to come.
  struct Place {
    uint64_t offset = 0;  // in the pool
    uint64_t bytes = 0;   // 0: not asked for
    bool is_there = false;
  };

  // All bytes of a wanted page lie in its frame: is it what the plan says?
  absl::Status Accept(uint32_t page, const Checksum128& checksum) {
    const Checksum128& said = saved_.pages[page].checksum;
    const bool is_right = checksum == said || host_->options_.unsafe_skip_verify;
    {
      MutexLock lock(&host_->mu_);
      host_->counters_.bytes_verified += places_[page].bytes;
      if (!is_right) ++host_->counters_.checksum_failures;
    }
    if (!is_right) {
      return WithReason(absl::DataLossError(absl::StrCat("receive page ", page, ": checksum 0x",
                                                         checksum.ToHex(), " != 0x", said.ToHex())),
                        "PAGE_DAMAGED", {{"page", absl::StrCat(page)}});
    }
    places_[page].is_there = true;
    --num_missing_;
    return absl::OkStatus();
  }

  absl::Status CheckRoom() ABSL_EXCLUSIVE_LOCKS_REQUIRED(host_->mu_) {
    if (kind_ == TransferKind::kPages) return absl::OkStatus();
    if (identity_ && host_->NumberOfLocked(identity_->id) != 0) {
      return absl::AlreadyExistsError(
          absl::StrCat("transfer: sequence ", identity_->id.ToString(), " is open here"));
    }
    if (host_->sequences_.size() < host_->options_.max_open_sequences) return absl::OkStatus();
    return WithRetryDelay(
        WithReason(absl::ResourceExhaustedError(absl::StrCat("transfer: ", host_->sequences_.size(),
                                                             " sequences are open, the limit is ",
                                                             host_->options_.max_open_sequences)),
                   "TOO_MANY_SEQUENCES"),
        absl::Seconds(1));
  }

  absl::StatusOr<std::optional<SequenceInfo>> CommitLocked()
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(host_->mu_) {
    PT_RETURN_IF_ERROR(CheckRoom());
    PT_RETURN_IF_ERROR(host_->CheckKnown("commit transfer", plan_));
    // From here on nothing can fail.
    const std::vector<PageId> pages = host_->AdoptCopies(*sequence_, saved_, plan_, keys_, got_);
    is_committed_ = true;
    std::optional<SequenceInfo> info;
    if (kind_ != TransferKind::kPages) {
      static_cast<SequenceRows&>(*sequence_) =
          host_->SavedRows(saved_.state, saved_.state.length(), keys_,
                           [&](uint32_t, const PageTable&, const SavedExtent& extent) -> Page& {
                             host_->mu_.AssertHeld();
                             return host_->pages_.Get(pages[extent.page]);
                           });
      // What its client has seen of it must not become shorter silently.
      sequence_->was_appended = true;
      host_->AddSequence(sequence_, identity_);
    }
    for (PageId id : pages) host_->pages_.Unref(host_->pages_.Get(id));
    if (kind_ != TransferKind::kPages) {
      SyncTails(*sequence_, sequence_->root, host_->page_tokens(), host_->pages_);
      info = host_->InfoOf(*sequence_);
    }
    host_->changed_.SignalAll();
    return info;
  }

  ModelHostImpl* const host_;
  const TransferKind kind_;
  const SequencePtr sequence_;  // nobody else's before the commit
  std::optional<SequenceIdentity> identity_;
  SavedCheckpoint saved_;  // its copies have no bodies
  std::vector<PrefixKey> keys_;
  CopyPlan plan_;
  Acquired got_;
  std::vector<Place> places_;  // [page]
  std::vector<uint32_t> wanted_;
  uint64_t wanted_bytes_ = 0;
  uint64_t num_missing_ = 0;
  bool is_committed_ = false;
  // The page that is coming.
  uint32_t page_ = kNoPage;
  uint64_t received_ = 0;
  ChecksumStream stream_;
};

absl::StatusOr<std::unique_ptr<IncomingSequence>> ModelHostImpl::BeginIncoming(
    const Tenant& tenant, TransferPlan plan, MonotonicTime deadline) {
  if (plan.state.tenant != tenant.name) {
    return absl::InvalidArgumentError("state is of another tenant than the call");
  }
  PT_RETURN_IF_ERROR(CheckSaved(plan.state, std::nullopt).status());
  PT_RETURN_IF_ERROR(CheckPages(plan, page_tokens()));
  auto incoming = std::make_unique<IncomingImpl>(this, tenant, std::move(plan));
  absl::Status reserved;
  {
    MutexLock lock(&mu_);
    reserved = incoming->Reserve(deadline);
  }
  PT_RETURN_IF_ERROR(reserved);  // its end gives back what it got
  Flush();
  return std::unique_ptr<IncomingSequence>(std::move(incoming));
}

}  // namespace pagetide
