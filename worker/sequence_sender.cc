#include "worker/sequence_sender.h"

#include <grpcpp/client_context.h>

#include <algorithm>
#include <chrono>
#include <iterator>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/error_info.h"
#include "base/log.h"
#include "base/status_context.h"
#include "base/status_macros.h"
#include "base/thread_group.h"
#include "pagetide/v1/transfer.grpc.pb.h"
#include "rpc/channel.h"
#include "rpc/retry.h"
#include "rpc/status_mapping.h"
#include "worker/service_support.h"
#include "worker/transfer_wire.h"

namespace pagetide {
namespace {

constexpr size_t kMaxAddressBytes = 1024;
constexpr absl::Duration kLinkEnds = absl::Seconds(8);
constexpr absl::Duration kLookAgain = absl::Milliseconds(100);

// Could the target have done what it was asked for, and only the answer be lost?
bool IsInDoubt(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status) ||
         absl::IsCancelled(status) || absl::IsUnknown(status) || absl::IsInternal(status) ||
         GetReason(status) == "TRANSFER_BUSY";
}

struct RetryInDoubt {
  static bool IsRetryable(const absl::Status& status) { return IsInDoubt(status); }
};

absl::Status Unresolved(SequenceId id, absl::string_view address) {
  return WithRetryDelay(
      WithReason(
          absl::UnavailableError(absl::StrCat(
              "send sequence ", id.ToString(), ": the worker at ", address,
              " was told to take it and has not answered; whether it has it is not known yet")),
          "TRANSFER_UNRESOLVED", {{"address", std::string(address)}}),
      absl::Seconds(1));
}

}  // namespace

// The other worker. For one thread.
class SequenceSender::Peer {
 public:
  static absl::StatusOr<std::unique_ptr<Peer>> Dial(const std::string& address,
                                                    const Clock* clock) {
    PT_ASSIGN_OR_RETURN(std::shared_ptr<grpc::Channel> channel, MakeBulkChannel(address));
    return std::unique_ptr<Peer>(new Peer(address, std::move(channel), clock));
  }

  template <typename Request, typename Response>
  absl::Status Call(grpc::Status (v1::TransferService::Stub::*method)(grpc::ClientContext*,
                                                                      const Request&, Response*),
                    const Request& request, Response* response, MonotonicTime deadline) {
    grpc::ClientContext context;
    SetDeadline(deadline, &context);
    return Said(FromGrpcStatus((stub_.get()->*method)(&context, request, response)));
  }

  // The target's end of a link, and at the same time `send`, this one's, with the id that the
  // target made.
  absl::Status ReceivePages(const v1::ReceivePagesRequest& request, MonotonicTime deadline,
                            FrameLink::Pair& pair,
                            absl::FunctionRef<absl::Status(absl::string_view id)> send) {
    grpc::ClientContext context;
    SetDeadline(deadline, &context);
    const auto reader = stub_->ReceivePages(&context, request);
    v1::ReceivePagesResponse first;
    // It refuses before there is an id.
    if (!reader->Read(&first)) return Said(FromGrpcStatus(reader->Finish()));
    absl::Status received;
    absl::Status sent;
    {
      ThreadGroup other("link-receive");  // its end waits for the target's
      other.Start([&] {
        v1::ReceivePagesResponse last;
        const bool is_there = reader->Read(&last);
        received = FromGrpcStatus(reader->Finish());
        if (received.ok() && !is_there) received = absl::InternalError("no second answer");
        if (!received.ok()) pair.Abort();
      });
      sent = send(first.link_id());
      if (!sent.ok()) context.TryCancel();
    }
    // What the target says of it says more than that its end is gone.
    if (!sent.ok() && (received.ok() || absl::IsCancelled(received))) return sent;
    return Said(received);
  }

  absl::Status Push(OutgoingSequence& outgoing, const std::string& transfer_id,
                    std::span<const uint32_t> wanted, MonotonicTime deadline,
                    v1::SendSequenceResponse* sent) {
    if (wanted.empty()) return absl::OkStatus();
    grpc::ClientContext context;
    SetDeadline(deadline, &context);
    v1::PushPagesResponse response;
    const auto writer = stub_->PushPages(&context, &response);
    v1::PushPagesRequest part;
    part.set_transfer_id(transfer_id);
    bool is_broken = false;
    const absl::Status read = outgoing.ReadPages(
        wanted, deadline, [&](uint32_t page, std::span<const std::byte> body) -> absl::Status {
          part.set_page(page);
          for (size_t at = 0; at < body.size(); at += kMaxTransferPartBytes) {
            const auto some = body.subspan(at, std::min(kMaxTransferPartBytes, body.size() - at));
            part.set_offset(at);
            part.set_data(some.data(), some.size());
            if (!writer->Write(part)) {
              is_broken = true;
              return absl::UnavailableError("the stream broke");
            }
            part.clear_transfer_id();
            sent->set_sent_bytes(sent->sent_bytes() + some.size());
          }
          sent->set_sent_pages(sent->sent_pages() + 1);
          return absl::OkStatus();
        });
    // Why a stream broke says its end.
    if (!read.ok() && !is_broken) context.TryCancel();
    if (read.ok()) writer->WritesDone();
    const absl::Status finished = FromGrpcStatus(writer->Finish());
    if (!read.ok() && !is_broken) return read;
    return Said(finished.ok() ? read : finished);
  }

 private:
  Peer(std::string address, std::shared_ptr<grpc::Channel> channel, const Clock* clock)
      : address_(std::move(address)), clock_(clock), stub_(v1::TransferService::NewStub(channel)) {}

  void SetDeadline(MonotonicTime deadline, grpc::ClientContext* context) const {
    const absl::Duration left = deadline - clock_->MonotonicNow();
    context->set_deadline(std::chrono::system_clock::now() + absl::ToChronoMicroseconds(left));
  }
  // With the reason and the facts that the target gave.
  absl::Status Said(const absl::Status& status) const {
    return WithContext(absl::StrCat("worker at ", address_), status);
  }

  const std::string address_;
  const Clock* const clock_;
  const std::unique_ptr<v1::TransferService::Stub> stub_;
};

SequenceSender::SequenceSender(Options options, Worker* worker, Parking* parking,
                               RequestMemos* memos, FrameLink* link)
    : options_(options),
      worker_(worker),
      parking_(parking),
      memos_(memos),
      link_(link),
      slots_({.what = "sends of sequences",
              .reason = "TOO_MANY_TRANSFERS",
              .in_all = options.max_running,
              .per_tenant = options.max_running_of_tenant}),
      share_slots_({.what = "sends of pages within shard groups",
                    .reason = "TOO_MANY_TRANSFERS",
                    .in_all = options.max_running,
                    .per_tenant = options.max_running_of_tenant}) {}

void SequenceSender::Count(const absl::Status& status) const {
  worker_->metrics()
      .GetCounter("pagetide_transfer_sends_total",
                  "Sequences sent to other workers, by the code of the answer",
                  {{"code", absl::StatusCodeToString(status.code())}})
      ->Increment();
}

absl::StatusOr<v1::SendSequenceResponse> SequenceSender::Counted(
    StreamSlots& slots, const Tenant& tenant,
    absl::FunctionRef<absl::StatusOr<v1::SendSequenceResponse>()> send) {
  const auto with_slot = [&]() -> absl::StatusOr<v1::SendSequenceResponse> {
    PT_ASSIGN_OR_RETURN(const auto slot, slots.Take(tenant.name));
    return send();
  };
  absl::StatusOr<v1::SendSequenceResponse> sent = with_slot();
  Count(sent.status());
  if (sent.ok()) {
    worker_->metrics()
        .GetCounter("pagetide_transfer_sent_bytes_total", "Bytes of pages sent to other workers")
        ->Add(static_cast<double>(sent->sent_bytes()));
  }
  return sent;
}

absl::StatusOr<v1::SendSequenceResponse> SequenceSender::Send(
    const Tenant& tenant, const v1::SendSequenceRequest& request, MonotonicTime deadline) {
  return Counted(slots_, tenant, [&] { return SendOnce(tenant, request, deadline); });
}

absl::StatusOr<v1::SendSequenceResponse> SequenceSender::SendPages(
    const Tenant& tenant, ModelHost* host, const SequenceHandle& sequence,
    const Digest& model_digest, const std::string& address, MonotonicTime deadline) {
  return Counted(share_slots_, tenant, [&]() -> absl::StatusOr<v1::SendSequenceResponse> {
    PT_ASSIGN_OR_RETURN(const std::unique_ptr<OutgoingSequence> outgoing,
                        TransfersOf(*host).BeginOutgoing(tenant, sequence, TransferKind::kPages,
                                                         address, deadline));
    TransferPlan plan = outgoing->plan();
    plan.state.model_digest = model_digest;
    return Transfer(tenant, host, sequence.id, *outgoing, plan, address, {}, deadline);
  });
}

absl::StatusOr<std::optional<v1::SendSequenceResponse>> SequenceSender::FindEarlier(
    const Tenant& tenant, const v1::SendSequenceRequest& request, SequenceId id) {
  Move move;
  {
    MutexLock lock(&mu_);
    const auto moved = moved_.find(id);
    if (moved != moved_.end() && moved->second.tenant.name == tenant.name &&
        moved->second.epoch == request.sequence().epoch() &&
        moved->second.address == request.target_address()) {
      return moved->second.sent;
    }
    const auto it = unresolved_.find(id);
    if (it == unresolved_.end() || it->second.tenant.name != tenant.name) return std::nullopt;
    move = it->second;
  }
  switch (Settle(move)) {
    case Outcome::kMoved:
      if (move.address == request.target_address()) return move.sent;
      return std::nullopt;  // it is not open here any more
    case Outcome::kNotMoved:
      return std::nullopt;
    case Outcome::kUnknown:
      break;
  }
  return Unresolved(id, move.address);
}

absl::StatusOr<v1::SendSequenceResponse> SequenceSender::SendOnce(
    const Tenant& tenant, const v1::SendSequenceRequest& request, MonotonicTime deadline) {
  const int asked =
      request.kind() == v1::TRANSFER_KIND_UNSPECIFIED ? v1::TRANSFER_KIND_COPY : request.kind();
  if (asked < v1::TRANSFER_KIND_COPY || asked > v1::TRANSFER_KIND_PAGES) {
    return absl::InvalidArgumentError(absl::StrCat("kind is ", asked, ", known are 1 to 3"));
  }
  const auto kind = static_cast<TransferKind>(asked);
  const std::string& address = request.target_address();
  if (address.empty() || address.size() > kMaxAddressBytes) {
    return absl::InvalidArgumentError(absl::StrCat("target_address has ", address.size(),
                                                   " bytes, must have 1 to ", kMaxAddressBytes));
  }
  PT_ASSIGN_OR_RETURN(const SequenceId id, SequenceIdFromProto(request.sequence().sequence_id()));
  if (kind == TransferKind::kMove) {
    PT_ASSIGN_OR_RETURN(std::optional<v1::SendSequenceResponse> earlier,
                        FindEarlier(tenant, request, id));
    if (earlier) return *std::move(earlier);
  }
  PT_ASSIGN_OR_RETURN(const HandleTarget target, FindSequence(*worker_, request.sequence()));
  PT_ASSIGN_OR_RETURN(
      const std::unique_ptr<OutgoingSequence> outgoing,
      TransfersOf(*target.host).BeginOutgoing(tenant, target.handle, kind, address, deadline));
  // After it was held: a park that began before is seen, a later one is refused.
  if (kind == TransferKind::kMove) PT_RETURN_IF_ERROR(parking_->CheckMayMove(id));
  return Transfer(tenant, target.host, id, *outgoing, outgoing->plan(), address, request.ttl(),
                  deadline);
}

absl::StatusOr<v1::SendSequenceResponse> SequenceSender::Transfer(
    const Tenant& tenant, ModelHost* host, SequenceId id, OutgoingSequence& outgoing,
    const TransferPlan& plan, const std::string& address, const google::protobuf::Duration& ttl,
    MonotonicTime deadline) {
  PT_ASSIGN_OR_RETURN(const std::unique_ptr<Peer> peer, Peer::Dial(address, &worker_->clock()));
  v1::ReserveTransferRequest reserve = PlanToProto(plan, tenant);
  reserve.set_request_id(absl::StrCat("send-", absl::Hex(worker_->incarnation(), absl::kZeroPad16),
                                      "-", next_request_.fetch_add(1)));
  *reserve.mutable_ttl() = ttl;
  v1::ReserveTransferResponse reserved;
  PT_RETURN_IF_ERROR(
      peer->Call(&v1::TransferService::Stub::ReserveTransfer, reserve, &reserved, deadline));
  reserve.Clear();
  v1::SendSequenceResponse response;
  absl::Status status;
  for (uint32_t page : reserved.wanted()) {
    if (page < plan.pages.size()) continue;
    status = absl::InternalError(
        absl::StrCat("worker at ", address, " asks for page ", page, " of ", plan.pages.size()));
  }
  if (status.ok()) {
    const std::vector<uint32_t> linked =
        SendByLink(*peer, tenant, *host, outgoing, reserved, deadline, &response);
    std::vector<uint32_t> others;
    std::set_difference(reserved.wanted().begin(), reserved.wanted().end(), linked.begin(),
                        linked.end(), std::back_inserter(others));
    // The target's end of a link that broke may take as long as a page to see it.
    const MonotonicTime busy_until = worker_->clock().MonotonicNow() + kLinkEnds;
    do {
      status = peer->Push(outgoing, reserved.transfer_id(), others, deadline, &response);
    } while (GetReason(status) == "TRANSFER_BUSY" && link_ != nullptr &&
             worker_->clock().MonotonicNow() < std::min(busy_until, deadline) &&
             (absl::SleepFor(kLookAgain), true));
  }
  if (!status.ok()) {
    // So that its frames are free at once; otherwise they are when its ttl has passed.
    Abort(*peer, reserved.transfer_id()).status().IgnoreError();
    return status;
  }
  Move move{.tenant = tenant,
            .host = host,
            .id = id,
            .epoch = plan.identity.epoch,
            .address = address,
            .transfer_id = reserved.transfer_id(),
            .target_id = reserved.worker_id(),
            .target_incarnation = reserved.incarnation()};
  PT_RETURN_IF_ERROR(Commit(*peer, outgoing, std::move(move), deadline, &response));
  return response;
}

std::vector<uint32_t> SequenceSender::SendByLink(Peer& peer, const Tenant& tenant, ModelHost& host,
                                                 OutgoingSequence& outgoing,
                                                 const v1::ReserveTransferResponse& reserved,
                                                 MonotonicTime deadline,
                                                 v1::SendSequenceResponse* sent) {
  if (link_ == nullptr || link_->name().empty() || reserved.link() != link_->name() ||
      !TransfersOf(host).has_device_addresses()) {
    return {};
  }
  const std::vector<uint32_t> wanted(reserved.wanted().begin(), reserved.wanted().end());
  std::vector<uint32_t> pages = outgoing.InFrames(wanted);
  uint64_t num_bytes = 0;
  for (uint32_t page : pages) num_bytes += outgoing.page_bytes(page);
  if (pages.empty() || num_bytes < link_->options().min_bytes) return {};
  const absl::Status status = [&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const std::unique_ptr<FrameLink::Pair> pair, link_->Take(tenant.name));
    // What is reserved must not expire meanwhile.
    const absl::Duration join_timeout =
        std::min(link_->options().join_timeout,
                 DurationFromProto("ttl", reserved.ttl()).value_or(absl::ZeroDuration()) / 2);
    v1::ReceivePagesRequest request;
    request.set_transfer_id(reserved.transfer_id());
    request.set_link(link_->name());
    request.mutable_pages()->Add(pages.begin(), pages.end());
    *request.mutable_join_timeout() = DurationToProto(join_timeout);
    request.set_proof(
        std::string(ProveLink(reserved.transfer_id(), link_->name(), tenant.salt).view()));
    return peer.ReceivePages(request, deadline, *pair, [&](absl::string_view id) {
      return pair->Send(id, join_timeout, outgoing, pages, deadline);
    });
  }();
  worker_->metrics()
      .GetCounter("pagetide_transfer_link_sends_total",
                  "Transfers whose pages went from GPU to GPU, by how that ended",
                  {{"code", absl::StatusCodeToString(status.code())}})
      ->Increment();
  if (!status.ok()) {
    LogWarning("worker", "transfer ", reserved.transfer_id(), ": its pages go by gRPC, not by ",
               link_->name(), ": ", status.message());
    return {};
  }
  sent->set_sent_pages(sent->sent_pages() + pages.size());
  sent->set_sent_bytes(sent->sent_bytes() + num_bytes);
  return pages;
}

absl::Status SequenceSender::Commit(Peer& peer, OutgoingSequence& outgoing, Move move,
                                    MonotonicTime deadline, v1::SendSequenceResponse* response) {
  const bool is_move = outgoing.plan().kind == TransferKind::kMove;
  const Clock& clock = worker_->clock();
  move.give_up = clock.MonotonicNow() + options_.give_up;
  v1::CommitTransferRequest request;
  request.set_transfer_id(move.transfer_id);
  const absl::Status status = CallWithRetry<RetryInDoubt>(
      RetryPolicy(), deadline - clock.MonotonicNow(), [&](absl::Duration left) {
        return peer.Call(&v1::TransferService::Stub::CommitTransfer, request,
                         response->mutable_committed(), clock.MonotonicNow() + left);
      });
  if (status.ok()) {
    if (is_move) CloseHere(move);
    return status;
  }
  if (!is_move) {
    const absl::StatusOr<v1::AbortTransferResponse> aborted = Abort(peer, move.transfer_id);
    if (!aborted.ok() || !aborted->has_committed()) return status;
    *response->mutable_committed() = aborted->committed();
    return absl::OkStatus();
  }
  // What the last attempt was told says nothing of those before it: only the target knows.
  move.hold = outgoing.KeepHold();
  move.sent = *response;
  move.sent.clear_committed();
  {
    // Known to others from here on, who may learn the outcome first.
    MutexLock lock(&mu_);
    unresolved_.insert_or_assign(move.id, move);
  }
  switch (Settle(move)) {
    case Outcome::kMoved:
      *response = move.sent;
      return absl::OkStatus();
    case Outcome::kNotMoved:
      return status;
    case Outcome::kUnknown:
      break;
  }
  LogWarning("worker", "send sequence ", move.id.ToString(), " to ", move.address,
             ": no answer to the commit: ", status.message(), "; it is asked for again");
  return Unresolved(move.id, move.address);
}

absl::StatusOr<v1::AbortTransferResponse> SequenceSender::Abort(
    Peer& peer, const std::string& transfer_id) const {
  v1::AbortTransferRequest request;
  request.set_transfer_id(transfer_id);
  v1::AbortTransferResponse response;
  PT_RETURN_IF_ERROR(peer.Call(&v1::TransferService::Stub::AbortTransfer, request, &response,
                               worker_->clock().MonotonicNow() + options_.ask_timeout));
  return response;
}

void SequenceSender::CloseHere(const Move& move) {
  // The store knows nothing of it: CheckMayMove said so, and while it was held no park began.
  TransfersOf(*move.host).CloseMoved(move.tenant, move.id, move.epoch).IgnoreError();
  memos_->ForgetSequence(move.tenant.name, move.id.ToString());
  worker_->NoteClosed(*move.host, move.tenant, move.id);
}

SequenceSender::Outcome SequenceSender::Settle(Move& move) {
  const absl::StatusOr<std::unique_ptr<Peer>> peer = Peer::Dial(move.address, &worker_->clock());
  const absl::StatusOr<v1::AbortTransferResponse> said =
      peer.ok() ? Abort(**peer, move.transfer_id)
                : absl::StatusOr<v1::AbortTransferResponse>(peer.status());
  // Another process may listen there by now, and knows nothing of it.
  const bool is_known = said.ok() && said->worker_id() == move.target_id &&
                        said->incarnation() == move.target_incarnation;
  const bool gives_up = !is_known && worker_->clock().MonotonicNow() >= move.give_up;
  if (!is_known && !gives_up) return Outcome::kUnknown;
  const bool is_moved = is_known && said->has_committed();
  if (is_moved) *move.sent.mutable_committed() = said->committed();
  {
    MutexLock lock(&mu_);
    const auto it = unresolved_.find(move.id);
    // Another learned it first, and acted on it.
    if (it == unresolved_.end() || it->second.transfer_id != move.transfer_id) {
      return is_moved ? Outcome::kMoved : gives_up ? Outcome::kUnknown : Outcome::kNotMoved;
    }
    unresolved_.erase(it);
    if (is_moved) {
      moved_.insert_or_assign(move.id, move);
      moved_in_order_.push_back(move.id);
      if (moved_in_order_.size() > options_.max_remembered) {
        moved_.erase(moved_in_order_.front());
        moved_in_order_.pop_front();
      }
    }
  }
  if (is_moved) {
    CloseHere(move);
    return Outcome::kMoved;
  }
  if (gives_up) {
    // It may be open there: going on here would make it two.
    LogWarning("worker", "sequence ", move.id.ToString(), " is closed: the worker at ",
               move.address, ", which was told to take it, has not answered for ",
               absl::FormatDuration(options_.give_up));
    CloseHere(move);
    return Outcome::kUnknown;
  }
  TransfersOf(*move.host).EndHold(move.id, move.hold);
  return Outcome::kNotMoved;
}

void SequenceSender::Resolve() {
  std::vector<Move> moves;
  {
    MutexLock lock(&mu_);
    for (const auto& [id, move] : unresolved_) moves.push_back(move);
  }
  for (Move& move : moves) Settle(move);
}

size_t SequenceSender::num_unresolved() const {
  MutexLock lock(&mu_);
  return unresolved_.size();
}

}  // namespace pagetide
