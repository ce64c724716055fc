#include "worker/sequence_service.h"

#include <grpcpp/impl/codegen/method_handler.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "rpc/status_mapping.h"

namespace pagetide {
namespace {

constexpr uint32_t kDefaultListSize = 100;
constexpr uint32_t kMaxListSize = 1000;
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
                                         Parking* parking)
    : worker_(worker),
      memos_(memos),
      local_plane_(local_plane),
      planner_(planner),
      parking_(parking) {
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
    const PromptRequest prompt{
        .tokens = TokensOf(request->tokens()), .inputs = inputs, .options = options};
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
  const uint32_t limit = request->page_size() == 0 ? kDefaultListSize : request->page_size();
  if (limit > kMaxListSize) {
    return ToGrpcStatus(absl::InvalidArgumentError(
        absl::StrCat("page_size is ", limit, ", must be at most ", kMaxListSize)));
  }
  uint64_t after = 0;
  if (!request->page_token().empty() && !absl::SimpleAtoi(request->page_token(), &after)) {
    return ToGrpcStatus(
        absl::InvalidArgumentError("page_token is not one that ListWorkerSequences has returned"));
  }
  std::vector<std::pair<SequenceInfo, ModelHost*>> found;
  for (ModelHost* host : worker_->Hosts()) {
    for (const SequenceInfo& info : host->List(call.tenant, after, limit + 1)) {
      found.emplace_back(info, host);
    }
  }
  std::sort(found.begin(), found.end(),
            [](const auto& a, const auto& b) { return a.first.number < b.first.number; });
  const bool more = found.size() > limit;
  if (more) found.resize(limit);
  for (const auto& [info, host] : found) {
    *response->add_sequences() = StateToProto(*worker_, *host, info);
  }
  if (more) response->set_next_page_token(absl::StrCat(found.back().first.number));
  return grpc::Status::OK;
}

grpc::Status SequenceServiceImpl::GetBlockTable(grpc::ServerContext* context,
                                                const v1::GetBlockTableRequest* request,
                                                v1::GetBlockTableResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto get = [&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const SequenceTarget target,
                        FindSequence(*worker_, request->sequence_id()));
    PT_ASSIGN_OR_RETURN(const absl::Duration lease, DurationFromProto("lease", request->lease()));
    ModelHost* const host = target.host;
    PT_ASSIGN_OR_RETURN(SequenceInfo info, host->Get(call.tenant, target.id));
    if (lease > absl::ZeroDuration()) {
      PT_RETURN_IF_ERROR(worker_->leases().CheckDuration("lease", lease));
      PinLeases::Pins pins;
      for (uint32_t g = 0; info.length > 0 && g < host->model().geometry().num_groups(); ++g) {
        PT_ASSIGN_OR_RETURN(auto pinned, host->PinRows(call.tenant, target.id, g,
                                                       ModelHost::kHeldRows, 0, call.deadline));
        pins.push_back(std::move(pinned));
      }
      PT_ASSIGN_OR_RETURN(*response->mutable_lease_id(),
                          worker_->leases().Add(std::move(pins), lease, nullptr));
      PT_ASSIGN_OR_RETURN(info, host->Get(call.tenant, target.id));
    }
    PT_ASSIGN_OR_RETURN(const auto table, host->GetBlockTable(call.tenant, target.id));
    *response->mutable_state() = StateToProto(*worker_, *host, info);
    for (const BlockTableEntry& entry : table) {
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
        extent->set_pool_offset(host->FrameOffset(entry.group, *entry.frame));
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
    const bool is_durable = parking_->Owns(target->id);
    PT_RETURN_IF_ERROR(target->host->Close(call.tenant, target->id, request->epoch()));
    if (is_durable) {
      PT_RETURN_IF_ERROR(
          parking_->Drop(call.tenant, target->id, request->epoch(), call.deadline).status());
    }
    memos_->ForgetSequence(call.tenant.name, request->sequence_id());
    worker_->NoteClosed(target->id);
    return absl::OkStatus();
  };
  return ToGrpcStatus(close());
}

}  // namespace pagetide
