#include "worker/sequence_service.h"

#include <grpcpp/impl/codegen/method_handler.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "rpc/status_mapping.h"
#include "worker/close_sequence.h"

namespace pagetide {
namespace {

// Extents of a table in one answer, of at most 140 bytes each.
constexpr uint32_t kMaxTableExtents = 16384;
// Messages of a WatchReadiness before the last. They fit the window of a stream, so that a caller
// who does not read them cannot block a call that holds frames or its place in the line for them.
constexpr int kMaxReadinessNews = 256;
constexpr absl::Duration kShutdownWait = absl::Seconds(10);

// Index of a method in its service: how grpc::Service numbers them.
int MethodIndex(const char* name) {
  return google::protobuf::DescriptorPool::generated_pool()
      ->FindServiceByName(v1::SequenceService::service_full_name())
      ->FindMethodByName(name)
      ->index();
}

}  // namespace

SequenceServiceImpl::SequenceServiceImpl(Worker* worker, RequestMemos* memos,
                                         LocalPlane* local_plane, const PromptPlanner* planner,
                                         Parking* parking, StreamDeadlines* deadlines)
    : worker_(worker),
      memos_(memos),
      local_plane_(local_plane),
      planner_(planner),
      parking_(parking),
      deadlines_(deadlines) {
  // The two bulk methods are handled as raw byte streams. On the wire a stream of one message is
  // the same as one message, so the declared kinds of the methods (and reflection) stay true.
  using Handler =
      grpc::internal::BidiStreamingHandler<SequenceServiceImpl, grpc::ByteBuffer, grpc::ByteBuffer>;
  using Call = grpc::Status (SequenceServiceImpl::*)(grpc::ServerContext*, RawStream*);
  const auto replace = [this](const char* name, Call call) {
    // gRPC owns the handler.
    MarkMethodStreamed(
        MethodIndex(name),
        new Handler([call](SequenceServiceImpl* self, grpc::ServerContext* context,
                           RawStream* stream) { return (self->*call)(context, stream); },
                    this));
  };
  replace("AppendTokens", &SequenceServiceImpl::AppendRaw);
  replace("ReadRows", &SequenceServiceImpl::ReadRaw);
}

SequenceServiceImpl::~SequenceServiceImpl() {
  if (!lent_.Wait(kShutdownWait)) {
    LogError("worker", "the transport still holds frames ", absl::FormatDuration(kShutdownWait),
             " after the server's end");
  }
}

grpc::Status SequenceServiceImpl::OpenSequence(grpc::ServerContext* context,
                                               const v1::OpenSequenceRequest* request,
                                               v1::OpenSequenceResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto open = [&]() -> absl::StatusOr<v1::OpenSequenceResponse> {
    PT_ASSIGN_OR_RETURN(const auto inputs, InputsFromProto(request->inputs()));
    PT_ASSIGN_OR_RETURN(ModelHost * host,
                        worker_->HostOfModel(request->model_digest(), call.deadline));
    const PromptOptions options{.allow_full_reuse = request->allow_full_reuse(),
                                .no_reuse = request->no_reuse()};
    const PromptRequest prompt{.tokens = TokensOf(request->tokens()),
                               .inputs = inputs,
                               .options = options,
                               .min_chunk_tokens = request->plan().min_chunk_tokens()};
    PT_ASSIGN_OR_RETURN(const OpenResult result,
                        planner_->Open(call.tenant, host, prompt, request->plan().session(),
                                       request->plan().session_version(), call.deadline));
    worker_->NoteSequence(*host, result.info);
    v1::OpenSequenceResponse answer;
    *answer.mutable_state() = StateToProto(*worker_, *host, result.info);
    *answer.mutable_reuse() = ReuseToProto(result.reuse);
    answer.set_restoring_pages(result.restoring_pages);
    return answer;
  };
  auto answer = memos_->OncePerTenant<v1::OpenSequenceResponse>(
      call.tenant.name, request->request_id(), DigestOfMessage(*request), call.deadline, open);
  if (!answer.ok()) return ToGrpcStatus(answer.status());
  *response = *std::move(answer);
  return grpc::Status::OK;
}

grpc::Status SequenceServiceImpl::WatchReadiness(
    grpc::ServerContext* context, const v1::WatchReadinessRequest* request,
    grpc::ServerWriter<v1::WatchReadinessResponse>* writer) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto watch = [&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const SequenceTarget target,
                        FindSequence(*worker_, request->sequence_id()));
    std::optional<uint64_t> seen;
    int num_told = 0;
    return target.host->WatchReadiness(
        call.tenant, target.id, call.deadline, [&](const Readiness& readiness) {
          if (context->IsCancelled()) return false;
          const bool is_news = seen != readiness.resident_tokens && num_told < kMaxReadinessNews;
          if (!readiness.done && !is_news) return true;
          seen = readiness.resident_tokens;
          ++num_told;
          v1::WatchReadinessResponse message;
          message.set_resident_tokens(readiness.resident_tokens);
          message.set_length(readiness.length);
          message.set_done(readiness.done);
          message.set_shortened_because(readiness.shortened_because);
          return writer->Write(message);
        });
  };
  return ToGrpcStatus(watch());
}

grpc::Status SequenceServiceImpl::ForkSequence(grpc::ServerContext* context,
                                               const v1::ForkSequenceRequest* request,
                                               v1::ForkSequenceResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto fork = [&]() -> absl::StatusOr<v1::ForkSequenceResponse> {
    PT_ASSIGN_OR_RETURN(const HandleTarget target, FindSequence(*worker_, request->source()));
    std::optional<uint64_t> length;
    if (request->has_length()) length = request->length();
    PT_ASSIGN_OR_RETURN(const ForkResult result,
                        target.host->Fork(call.tenant, target.handle, length, call.deadline));
    worker_->NoteSequence(*target.host, result.info);
    v1::ForkSequenceResponse answer;
    *answer.mutable_state() = StateToProto(*worker_, *target.host, result.info);
    answer.set_shared_pages(result.shared_pages);
    answer.set_copied_rows(result.copied_rows);
    return answer;
  };
  auto answer = memos_->OncePerTenant<v1::ForkSequenceResponse>(
      call.tenant.name, request->request_id(), DigestOfMessage(*request), call.deadline, fork);
  if (!answer.ok()) return ToGrpcStatus(answer.status());
  *response = *std::move(answer);
  return grpc::Status::OK;
}

grpc::Status SequenceServiceImpl::GetSequence(grpc::ServerContext* context,
                                              const v1::GetSequenceRequest* request,
                                              v1::GetSequenceResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto get = [&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const SequenceTarget target,
                        FindSequence(*worker_, request->sequence_id()));
    PT_ASSIGN_OR_RETURN(const SequenceInfo info, target.host->Get(call.tenant, target.id));
    *response->mutable_state() = StateToProto(*worker_, *target.host, info);
    return absl::OkStatus();
  };
  return ToGrpcStatus(get());
}

grpc::Status SequenceServiceImpl::ListWorkerSequences(grpc::ServerContext* context,
                                                      const v1::ListWorkerSequencesRequest* request,
                                                      v1::ListWorkerSequencesResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const absl::StatusOr<uint32_t> limit =
      ListSize(request->page_size(), kDefaultListSize, kMaxListSize);
  if (!limit.ok()) return ToGrpcStatus(limit.status());
  uint64_t after = 0;
  if (!request->page_token().empty()) {
    const auto token = ParsePageToken<1>(request->page_token());
    if (!token.ok()) return ToGrpcStatus(token.status());
    after = token->front();
  }
  std::vector<std::pair<SequenceInfo, ModelHost*>> found;
  for (ModelHost* host : worker_->Hosts()) {
    for (const SequenceInfo& info : host->List(call.tenant, after, *limit + 1)) {
      found.emplace_back(info, host);
    }
  }
  std::sort(found.begin(), found.end(),
            [](const auto& a, const auto& b) { return a.first.number < b.first.number; });
  const bool more = found.size() > *limit;
  if (more) found.resize(*limit);
  for (const auto& [info, host] : found) {
    *response->add_sequences() = StateToProto(*worker_, *host, info);
  }
  if (more) response->set_next_page_token(MakePageToken({found.back().first.number}));
  return grpc::Status::OK;
}

absl::StatusOr<PinLeases::Table> SequenceServiceImpl::TableOf(
    const CallContext& call, const v1::GetBlockTableRequest& request, uint32_t page_size,
    std::string* lease_id) {
  PT_ASSIGN_OR_RETURN(const SequenceId id, SequenceIdFromProto(request.sequence_id()));
  PT_ASSIGN_OR_RETURN(const absl::Duration lease, DurationFromProto("lease", request.lease()));
  const bool wants_lease = lease > absl::ZeroDuration();
  if (wants_lease && (!request.lease_id().empty() || !request.page_token().empty())) {
    return absl::InvalidArgumentError(
        "lease is for the first page of a table; the next ones name its lease_id");
  }
  PinLeases& leases = worker_->leases();
  if (!request.lease_id().empty()) {
    // Before the sequence is looked for: it may have been closed since, its frames stay leased.
    *lease_id = request.lease_id();
    return leases.FindTable(call.tenant.name, id, request.lease_id());
  }
  PT_ASSIGN_OR_RETURN(ModelHost * host, worker_->HostOfSequence(id));
  if (!wants_lease) {
    PT_ASSIGN_OR_RETURN(BlockTable table, host->GetBlockTable(call.tenant, id));
    return std::make_shared<const PinLeases::HostTable>(
        PinLeases::HostTable{{std::move(table), nullptr}, host});
  }
  PT_RETURN_IF_ERROR(leases.CheckDuration("lease", lease));
  PT_ASSIGN_OR_RETURN(ModelHost::PinnedTable pinned,
                      host->PinTable(call.tenant, id, call.deadline));
  const auto table =
      std::make_shared<const PinLeases::HostTable>(PinLeases::HostTable{std::move(pinned), host});
  // What this answer holds whole nobody asks for again.
  if (table->entries.size() <= page_size) {
    PT_ASSIGN_OR_RETURN(*lease_id, leases.Add(table->pages, lease, nullptr));
  } else {
    PT_ASSIGN_OR_RETURN(*lease_id, leases.AddTable(call.tenant.name, table, lease));
  }
  return table;
}

grpc::Status SequenceServiceImpl::GetBlockTable(grpc::ServerContext* context,
                                                const v1::GetBlockTableRequest* request,
                                                v1::GetBlockTableResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto get = [&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const uint32_t page_size,
                        ListSize(request->page_size(), kMaxTableExtents, kMaxTableExtents));
    if (const uint64_t client = request->local_client_id(); client != 0) {
      if (local_plane_ == nullptr) {
        return WithReason(absl::NotFoundError(absl::StrCat("local_client_id ", client,
                                                           ": this worker has no local plane")),
                          "LOCAL_CLIENT_NOT_FOUND");
      }
      PT_RETURN_IF_ERROR(local_plane_->CheckClient(client));
    }
    PT_ASSIGN_OR_RETURN(const PinLeases::Table table,
                        TableOf(call, *request, page_size, response->mutable_lease_id()));
    // Of the answer before: the revision it was of, and the extents up to its end.
    uint64_t at = 0;
    if (!request->page_token().empty()) {
      PT_ASSIGN_OR_RETURN(const auto token, ParsePageToken<2>(request->page_token()));
      if (token[0] != table->info.revision || token[1] >= table->entries.size()) {
        return absl::AbortedError(absl::StrCat(
            "page_token is of revision ", token[0], ", extent ", token[1], "; sequence ",
            table->info.id.ToString(), " has revision ", table->info.revision, " and ",
            table->entries.size(), " extents: start again, or with a lease"));
      }
      at = token[1];
    }
    *response->mutable_state() = StateToProto(*worker_, *table->host, table->info);
    const uint64_t end = std::min<uint64_t>(table->entries.size(), at + page_size);
    if (end < table->entries.size()) {
      response->set_next_page_token(MakePageToken({table->info.revision, end}));
    }
    for (; at < end; ++at) {
      const BlockTableEntry& entry = table->entries[at];
      v1::GetBlockTableResponse::Extent* extent = response->add_extents();
      extent->set_group(entry.group);
      extent->set_first_position(entry.first_position);
      extent->set_first_row(entry.first_row);
      extent->set_pending_shift(entry.shift);
      extent->set_first_slot(entry.first_slot);
      extent->set_count(entry.count);
      extent->set_page_id(entry.page.value());
      extent->set_page_state(entry.page_state);
      if (entry.frame.has_value()) {
        extent->set_frame(entry.frame->value());
        extent->set_pool_offset(table->host->FrameOffset(entry.group, *entry.frame));
      }
      if (entry.key.has_value()) extent->set_page_key(entry.key->digest.ToBytes());
      extent->set_references(entry.references);
      extent->set_pins(entry.pins);
    }
    return absl::OkStatus();
  };
  return ToGrpcStatus(get());
}

grpc::Status SequenceServiceImpl::CloseSequence(grpc::ServerContext* context,
                                                const v1::CloseSequenceRequest* request,
                                                v1::CloseSequenceResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto close = [&]() -> absl::Status {
    const absl::StatusOr<SequenceTarget> target = FindSequence(*worker_, request->sequence_id());
    if (absl::IsNotFound(target.status())) {
      PT_ASSIGN_OR_RETURN(const SequenceId id, SequenceId::Parse(request->sequence_id()));
      // It may be parked, or its close may have ended halfway.
      PT_ASSIGN_OR_RETURN(const bool was_parked,
                          parking_->Drop(call.tenant, id, request->epoch(), call.deadline));
      // One of ours that is not open is closed: the call is idempotent.
      const bool is_ours = id.incarnation == worker_->incarnation();
      return was_parked || is_ours ? absl::OkStatus() : target.status();
    }
    PT_RETURN_IF_ERROR(target.status());
    return CloseSequenceHere(worker_, parking_, memos_, call.tenant, target->host, target->id,
                             request->epoch(), call.deadline);
  };
  return ToGrpcStatus(close());
}

}  // namespace pagetide
