#include "worker/incoming_transfers.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

absl::Status NotFound(absl::string_view id) {
  // What a caller sent is not repeated at any length.
  return WithReason(
      absl::NotFoundError(absl::StrCat("transfer ", id.substr(0, 64),
                                       " is not open here: it expired, was aborted, or never was")),
      "TRANSFER_NOT_FOUND");
}

absl::Status Busy(absl::string_view id, absl::string_view with) {
  return WithRetryDelay(WithReason(absl::AbortedError(absl::StrCat("transfer ", id, ": another ",
                                                                   with, " of it runs")),
                                   "TRANSFER_BUSY"),
                        absl::Milliseconds(50));
}

}  // namespace

struct IncomingTransfers::Transfer {
  const std::string id;
  const std::string tenant;
  ModelHost* const host;
  const bool is_move;
  const absl::Duration ttl;
  // Of who pushes or commits, which is one at a time; its end is of the last who has it.
  const std::unique_ptr<IncomingSequence> incoming;
  // The rest under the mutex of the table.
  MonotonicTime expires;
  bool is_pushing = false;
  bool is_committing = false;
  bool has_ended = false;
};

IncomingTransfers::IncomingTransfers(Options options, const Clock* clock, Metrics* metrics)
    : options_(options),
      clock_(clock),
      metrics_(metrics),
      num_open_gauge_(metrics->GetGauge("pagetide_transfer_open", "Transfers reserved here")),
      received_pages_(metrics->GetCounter("pagetide_transfer_received_pages_total",
                                          "Pages that came from other workers and were verified")),
      received_bytes_(metrics->GetCounter("pagetide_transfer_received_bytes_total",
                                          "Bytes of pages that came from other workers")),
      known_pages_(metrics->GetCounter("pagetide_transfer_known_pages_total",
                                       "Pages of reserved transfers that were here already")),
      damaged_pages_(metrics->GetCounter("pagetide_transfer_damaged_pages_total",
                                         "Pages that came with other bytes than was said")) {}

IncomingTransfers::~IncomingTransfers() = default;

Counter* IncomingTransfers::Ended(absl::string_view outcome) const {
  return metrics_->GetCounter("pagetide_transfer_ended_total",
                              "Transfers that were reserved here, by how they ended",
                              {{"outcome", std::string(outcome)}});
}

std::shared_ptr<IncomingTransfers::Transfer> IncomingTransfers::FindOpen(const Tenant& tenant,
                                                                         absl::string_view id) {
  const auto it = open_.find(id);
  return it == open_.end() || it->second->tenant != tenant.name ? nullptr : it->second;
}

const IncomingTransfers::Committed* IncomingTransfers::FindCommitted(const Tenant& tenant,
                                                                     absl::string_view id) {
  const auto it = past_.find(id);
  return it == past_.end() || it->second.tenant != tenant.name ? nullptr : &it->second.committed;
}

void IncomingTransfers::Take(Transfer& transfer) {
  transfer.has_ended = true;
  open_.erase(transfer.id);
  const auto held = by_tenant_.find(transfer.tenant);
  if (--held->second == 0) by_tenant_.erase(held);
  num_open_gauge_->Set(static_cast<double>(open_.size()));
}

absl::StatusOr<IncomingTransfers::Reserved> IncomingTransfers::Reserve(const Tenant& tenant,
                                                                       ModelHost* host,
                                                                       TransferPlan plan,
                                                                       absl::Duration ttl,
                                                                       MonotonicTime deadline) {
  if (ttl == absl::ZeroDuration()) ttl = options_.default_ttl;
  if (ttl < absl::ZeroDuration() || ttl > options_.max_ttl) {
    return absl::InvalidArgumentError(absl::StrCat("ttl is ", absl::FormatDuration(ttl),
                                                   ", must be above 0 and at most ",
                                                   absl::FormatDuration(options_.max_ttl)));
  }
  const bool is_move = plan.kind == TransferKind::kMove;
  {
    MutexLock lock(&mu_);
    const auto held = by_tenant_.find(tenant.name);
    const uint32_t of_tenant = held == by_tenant_.end() ? 0 : held->second;
    if (open_.size() + num_reserving_ >= options_.max_open ||
        of_tenant >= options_.max_open_of_tenant) {
      return WithRetryDelay(
          WithReason(absl::ResourceExhaustedError(
                         absl::StrCat("reserve transfer: ", open_.size() + num_reserving_,
                                      " are open, ", of_tenant, " of this tenant; the limits are ",
                                      options_.max_open, " and ", options_.max_open_of_tenant)),
                     "TOO_MANY_TRANSFERS"),
          absl::Seconds(1));
    }
    ++num_reserving_;
    ++by_tenant_[tenant.name];
  }
  absl::StatusOr<std::unique_ptr<IncomingSequence>> incoming =
      TransfersOf(*host).BeginIncoming(tenant, std::move(plan), deadline);
  MutexLock lock(&mu_);
  --num_reserving_;
  if (!incoming.ok()) {
    const auto held = by_tenant_.find(tenant.name);
    if (--held->second == 0) by_tenant_.erase(held);
    return incoming.status();
  }
  const std::span<const uint32_t> wanted = (*incoming)->wanted();
  Reserved reserved{.id = absl::StrCat(absl::Hex(options_.incarnation, absl::kZeroPad16), "-",
                                       absl::Hex(next_++)),
                    .wanted = {wanted.begin(), wanted.end()},
                    .wanted_bytes = (*incoming)->wanted_bytes(),
                    .ttl = ttl};
  known_pages_->Add(static_cast<double>((*incoming)->num_pages() - wanted.size()));
  open_[reserved.id].reset(new Transfer{.id = reserved.id,
                                        .tenant = tenant.name,
                                        .host = host,
                                        .is_move = is_move,
                                        .ttl = ttl,
                                        .incoming = *std::move(incoming),
                                        .expires = clock_->MonotonicNow() + ttl});
  num_open_gauge_->Set(static_cast<double>(open_.size()));
  return reserved;
}

absl::StatusOr<std::unique_ptr<IncomingTransfers::Push>> IncomingTransfers::BeginPush(
    const Tenant& tenant, absl::string_view id) {
  MutexLock lock(&mu_);
  std::shared_ptr<Transfer> transfer = FindOpen(tenant, id);
  if (transfer == nullptr) return NotFound(id);
  if (transfer->is_pushing || transfer->is_committing) {
    return Busy(id, transfer->is_pushing ? "push" : "commit");
  }
  transfer->is_pushing = true;
  transfer->expires = clock_->MonotonicNow() + transfer->ttl;
  return std::unique_ptr<Push>(new Push(this, std::move(transfer)));
}

IncomingTransfers::Push::~Push() {
  MutexLock lock(&transfers_->mu_);
  transfer_->is_pushing = false;
}

uint64_t IncomingTransfers::Push::num_missing() const {
  return transfer_->incoming->num_missing();
}

absl::Status IncomingTransfers::Push::Renew() {
  MutexLock lock(&transfers_->mu_);
  if (transfer_->has_ended) return NotFound(transfer_->id);
  transfer_->expires = transfers_->clock_->MonotonicNow() + transfer_->ttl;
  return absl::OkStatus();
}

void IncomingTransfers::Push::Count(const absl::Status& status, bool is_whole) {
  if (absl::IsDataLoss(status)) transfers_->damaged_pages_->Increment();
  if (!status.ok() || !is_whole) return;
  ++received_pages_;
  transfers_->received_pages_->Increment();
}

absl::Status IncomingTransfers::Push::Write(uint32_t page, uint64_t offset,
                                            std::span<const std::byte> bytes) {
  PT_RETURN_IF_ERROR(Renew());
  received_bytes_ += bytes.size();
  transfers_->received_bytes_->Add(static_cast<double>(bytes.size()));
  const absl::StatusOr<bool> is_whole = transfer_->incoming->Write(page, offset, bytes);
  Count(is_whole.status(), is_whole.value_or(false));
  return is_whole.status();
}

absl::Status IncomingTransfers::Push::Fill(uint32_t page, IncomingSequence::PageFill fill) {
  PT_RETURN_IF_ERROR(Renew());
  const absl::Status status =
      transfer_->incoming->Fill(page, [&](const CollectiveBuffer& frame) -> absl::Status {
        PT_RETURN_IF_ERROR(fill(frame));
        received_bytes_ += frame.num_bytes;
        transfers_->received_bytes_->Add(static_cast<double>(frame.num_bytes));
        return absl::OkStatus();
      });
  Count(status, /*is_whole=*/true);
  return status;
}

void IncomingTransfers::ForgetPast() {
  const MonotonicTime now = clock_->MonotonicNow();
  for (InOrder* past : {&past_moves_, &past_others_}) {
    while (!past->empty() && past->front().first <= now) {
      past_.erase(past->front().second);
      past->pop_front();
    }
  }
}

void IncomingTransfers::Remember(const std::shared_ptr<Transfer>& transfer,
                                 const Committed& committed) {
  ForgetPast();
  InOrder& past = committed.is_move ? past_moves_ : past_others_;
  past.emplace_back(clock_->MonotonicNow() + options_.remember, transfer->id);
  past_[transfer->id] = {transfer->tenant, committed};
  if (past_others_.size() > options_.max_remembered) {
    past_.erase(past_others_.front().second);
    past_others_.pop_front();
  }
}

absl::StatusOr<IncomingTransfers::Committed> IncomingTransfers::Commit(const Tenant& tenant,
                                                                       absl::string_view id,
                                                                       bool* is_repeat) {
  *is_repeat = false;
  std::shared_ptr<Transfer> transfer;
  {
    MutexLock lock(&mu_);
    if (const Committed* committed = FindCommitted(tenant, id)) {
      *is_repeat = true;
      return *committed;
    }
    transfer = FindOpen(tenant, id);
    if (transfer == nullptr) return NotFound(id);
    if (transfer->is_pushing || transfer->is_committing) {
      return Busy(id, transfer->is_pushing ? "push" : "commit");
    }
    if (transfer->is_move) {
      // Forgotten, it would be "not there" for a source that missed the answer.
      ForgetPast();
      if (past_moves_.size() >= options_.max_remembered) {
        return WithRetryDelay(
            WithReason(absl::ResourceExhaustedError(absl::StrCat(
                           "commit transfer: ", past_moves_.size(), " moves are remembered")),
                       "TOO_MANY_TRANSFERS"),
            absl::Seconds(1));
      }
    }
    transfer->is_committing = true;
  }
  absl::StatusOr<std::optional<SequenceInfo>> info = transfer->incoming->Commit();
  MutexLock lock(&mu_);
  transfer->is_committing = false;
  transfer->expires = clock_->MonotonicNow() + transfer->ttl;
  PT_RETURN_IF_ERROR(info.status());
  const IncomingSequence& incoming = *transfer->incoming;
  Committed committed{.host = transfer->host,
                      .info = *std::move(info),
                      .is_move = transfer->is_move,
                      .pages = incoming.num_pages(),
                      .received_pages = incoming.wanted().size(),
                      .received_bytes = incoming.wanted_bytes()};
  Take(*transfer);
  Remember(transfer, committed);
  Ended("committed")->Increment();
  return committed;
}

absl::StatusOr<std::optional<IncomingTransfers::Committed>> IncomingTransfers::Abort(
    const Tenant& tenant, absl::string_view id) {
  std::shared_ptr<Transfer> transfer;  // its end, without the lock, frees what it holds
  {
    MutexLock lock(&mu_);
    if (const Committed* committed = FindCommitted(tenant, id)) return *committed;
    transfer = FindOpen(tenant, id);
    if (transfer == nullptr) return std::nullopt;
    if (transfer->is_committing) return Busy(id, "commit");
    Take(*transfer);
  }
  Ended("aborted")->Increment();
  return std::nullopt;
}

void IncomingTransfers::Expire() {
  std::vector<std::shared_ptr<Transfer>>
      ended;  // their end, without the lock, frees what they hold
  {
    MutexLock lock(&mu_);
    const MonotonicTime now = clock_->MonotonicNow();
    for (const auto& [id, transfer] : open_) {
      if (transfer->expires <= now && !transfer->is_committing) ended.push_back(transfer);
    }
    for (const std::shared_ptr<Transfer>& transfer : ended) Take(*transfer);
  }
  for (size_t i = 0; i < ended.size(); ++i) Ended("expired")->Increment();
}

size_t IncomingTransfers::num_open() const {
  MutexLock lock(&mu_);
  return open_.size();
}

}  // namespace pagetide
