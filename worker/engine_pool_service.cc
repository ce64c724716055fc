#include "worker/engine_pool_service.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "rpc/status_mapping.h"

namespace pagetide {
namespace {

// A message of a watch is a few hundred bytes: so many fit the window of a stream whose reader has
// gone to sleep.
constexpr int kMaxWatchNews = 256;

EnginePoolRef RefOf(const v1::EnginePoolRef& ref) {
  return {ref.name(), ref.generation()};
}

void RefToProto(const EnginePoolRef& ref, v1::EnginePoolRef* proto) {
  proto->set_name(ref.name);
  proto->set_generation(ref.generation);
}

EnginePlaneSpec PlaneOf(const v1::EnginePlane& plane) {
  return {.memory = plane.memory(),
          .offset = plane.offset(),
          .block_stride = plane.block_stride(),
          .token_stride = plane.token_stride(),
          .head_stride = plane.head_stride()};
}

absl::StatusOr<std::optional<DataType>> TypeOf(const std::string& field, v1::DataType type) {
  static_assert(static_cast<int>(DataType::kF32) == v1::DATA_TYPE_F32);
  static_assert(static_cast<int>(DataType::kIQ4NL) == v1::DATA_TYPE_IQ4_NL);
  if (type == v1::DATA_TYPE_UNSPECIFIED) return std::optional<DataType>();
  if (!v1::DataType_IsValid(type)) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, " is ", static_cast<int>(type), ", which is no data type"));
  }
  return std::optional(static_cast<DataType>(type));
}

absl::StatusOr<EnginePoolSpec> SpecOf(const v1::RegisterEnginePoolRequest& request) {
  static_assert(static_cast<int>(EngineHeads::kNhd) == v1::EngineGroup::LAYOUT_NHD);
  static_assert(static_cast<int>(EngineHeads::kHnd) == v1::EngineGroup::LAYOUT_HND);
  EnginePoolSpec spec;
  spec.block_tokens = request.block_tokens();
  spec.num_blocks = request.num_blocks();
  for (int g = 0; g < request.groups_size(); ++g) {
    const v1::EngineGroup& group = request.groups(g);
    const std::string field = absl::StrCat("groups[", g, "]");
    EngineGroupSpec& to = spec.groups.emplace_back();
    if (group.layout() != v1::EngineGroup::LAYOUT_NHD &&
        group.layout() != v1::EngineGroup::LAYOUT_HND) {
      return absl::InvalidArgumentError(absl::StrCat(field, ".layout is ",
                                                     static_cast<int>(group.layout()),
                                                     ", must be LAYOUT_NHD or LAYOUT_HND"));
    }
    to.heads = static_cast<EngineHeads>(group.layout());
    PT_ASSIGN_OR_RETURN(to.k_type, TypeOf(absl::StrCat(field, ".k_type"), group.k_type()));
    PT_ASSIGN_OR_RETURN(to.v_type, TypeOf(absl::StrCat(field, ".v_type"), group.v_type()));
    to.kv_heads = group.kv_heads();
    for (int l = 0; l < group.layers_size(); ++l) {
      const v1::EngineGroup::Layer& layer = group.layers(l);
      if (!layer.has_k()) {
        return absl::InvalidArgumentError(absl::StrCat(field, ".layers[", l, "].k is absent"));
      }
      EngineGroupSpec::Layer& added = to.layers.emplace_back();
      added.k = PlaneOf(layer.k());
      if (layer.has_v()) added.v = PlaneOf(layer.v());
    }
  }
  return spec;
}

void MapsOf(const google::protobuf::RepeatedPtrField<v1::SlotMap>& maps,
            std::vector<EngineSlotMap>* to) {
  for (const v1::SlotMap& map : maps) {
    to->push_back({map.first_token(), {map.blocks().begin(), map.blocks().end()}});
  }
}

void JobToProto(const EngineJobInfo& info, v1::EngineJob* job) {
  static_assert(static_cast<int>(EngineJobKind::kStore) == v1::EngineJob::KIND_STORE);
  static_assert(static_cast<int>(EngineJobState::kQueued) == v1::EngineJob::STATE_QUEUED);
  static_assert(static_cast<int>(EngineJobState::kCancelled) == v1::EngineJob::STATE_CANCELLED);
  job->set_job_id(info.id);
  job->set_kind(static_cast<v1::EngineJob::Kind>(info.kind));
  job->set_state(static_cast<v1::EngineJob::State>(info.state));
  RefToProto(info.pool, job->mutable_pool());
  job->set_num_tokens(info.num_tokens);
  job->set_usable_tokens(info.progress.usable_tokens);
  job->set_moved_pages(info.progress.moved_pages);
  job->set_moved_bytes(info.progress.moved_bytes);
  job->set_known_pages(info.progress.known_pages);
  if (info.progress.reuse) *job->mutable_reuse() = ReuseToProto(*info.progress.reuse);
  job->set_code(static_cast<int32_t>(info.status.code()));
  job->set_reason(GetReason(info.status));
  job->set_message(std::string(info.status.message()));
  if (info.progress.limiting_group) job->set_limiting_group(*info.progress.limiting_group);
}

}  // namespace

EnginePoolServiceImpl::EnginePoolServiceImpl(Worker* worker, EnginePools* pools,
                                             const LocalPlane* local_plane, RequestMemos* memos,
                                             StreamDeadlines* deadlines)
    : worker_(worker),
      pools_(pools),
      local_plane_(local_plane),
      memos_(memos),
      deadlines_(deadlines),
      watches_({.what = "watches of engine jobs",
                .reason = "TOO_MANY_WATCHES",
                .in_all = 256,
                .per_tenant = 128}) {}

absl::StatusOr<v1::RegisterEnginePoolResponse> EnginePoolServiceImpl::Register(
    const CallContext& call, const v1::RegisterEnginePoolRequest& request) {
  if (local_plane_ == nullptr) {
    return WithReason(
        absl::FailedPreconditionError("register an engine pool: this worker has no local plane"),
        "NO_LOCAL_PLANE");
  }
  PT_ASSIGN_OR_RETURN(EnginePoolSpec spec, SpecOf(request));
  EnginePools::Registration registration{
      .name = request.name(), .client_id = request.local_client_id(), .spec = std::move(spec)};
  PT_ASSIGN_OR_RETURN(registration.memories, local_plane_->MemoriesOf(request.local_client_id()));
  PT_ASSIGN_OR_RETURN(ModelHost * host,
                      worker_->HostOfModel(request.model_digest(), call.deadline));
  PT_ASSIGN_OR_RETURN(const EnginePoolRef ref,
                      pools_->Register(call.tenant, host, std::move(registration), call.deadline));
  // A client that left before the pool was there was not told to end it.
  if (const absl::Status here = local_plane_->MemoriesOf(request.local_client_id()).status();
      !here.ok()) {
    pools_->DropClient(request.local_client_id());
    return here;
  }
  v1::RegisterEnginePoolResponse response;
  RefToProto(ref, response.mutable_pool());
  return response;
}

grpc::Status EnginePoolServiceImpl::RegisterEnginePool(grpc::ServerContext* context,
                                                       const v1::RegisterEnginePoolRequest* request,
                                                       v1::RegisterEnginePoolResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  auto answer = memos_->OncePerTenant<v1::RegisterEnginePoolResponse>(
      call.tenant.name, request->request_id(), DigestOfMessage(*request), call.deadline,
      [&] { return Register(call, *request); });
  if (!answer.ok()) return ToGrpcStatus(answer.status());
  *response = *std::move(answer);
  return grpc::Status::OK;
}

grpc::Status EnginePoolServiceImpl::UnregisterEnginePool(
    grpc::ServerContext* context, const v1::UnregisterEnginePoolRequest* request,
    v1::UnregisterEnginePoolResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  return ToGrpcStatus(pools_->Unregister(call.tenant, RefOf(request->pool()), call.deadline));
}

grpc::Status EnginePoolServiceImpl::LoadPages(grpc::ServerContext* context,
                                              const v1::LoadPagesRequest* request,
                                              v1::LoadPagesResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto load = [&]() -> absl::StatusOr<v1::LoadPagesResponse> {
    EnginePools::Request wanted{.pool = RefOf(request->pool()),
                                .allow_full_reuse = request->allow_full_reuse()};
    if (!request->sequence_id().empty()) {
      if (request->tokens_size() > 0 || request->inputs_size() > 0) {
        return absl::InvalidArgumentError("sequence_id is set, and so are tokens or inputs");
      }
      PT_ASSIGN_OR_RETURN(wanted.sequence, SequenceIdFromProto(request->sequence_id()));
      if (request->has_num_rows()) wanted.num_rows = request->num_rows();
    } else if (request->has_num_rows()) {
      return absl::InvalidArgumentError("num_rows is set, and sequence_id is not");
    }
    wanted.tokens.assign(request->tokens().begin(), request->tokens().end());
    PT_ASSIGN_OR_RETURN(wanted.inputs, InputsFromProto(request->inputs()));
    MapsOf(request->slot_maps(), &wanted.maps);
    PT_ASSIGN_OR_RETURN(wanted.time_limit, DurationFromProto("time_limit", request->time_limit()));
    PT_ASSIGN_OR_RETURN(const EngineJobInfo info,
                        pools_->Submit(call.tenant, EngineJobKind::kLoad, std::move(wanted)));
    v1::LoadPagesResponse answer;
    JobToProto(info, answer.mutable_job());
    return answer;
  };
  auto answer = memos_->OncePerTenant<v1::LoadPagesResponse>(
      call.tenant.name, request->request_id(), DigestOfMessage(*request), call.deadline, load);
  if (!answer.ok()) return ToGrpcStatus(answer.status());
  *response = *std::move(answer);
  return grpc::Status::OK;
}

grpc::Status EnginePoolServiceImpl::StorePages(grpc::ServerContext* context,
                                               const v1::StorePagesRequest* request,
                                               v1::StorePagesResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto store = [&]() -> absl::StatusOr<v1::StorePagesResponse> {
    EnginePools::Request wanted{.pool = RefOf(request->pool())};
    wanted.tokens.assign(request->tokens().begin(), request->tokens().end());
    PT_ASSIGN_OR_RETURN(wanted.inputs, InputsFromProto(request->inputs()));
    MapsOf(request->slot_maps(), &wanted.maps);
    PT_ASSIGN_OR_RETURN(wanted.time_limit, DurationFromProto("time_limit", request->time_limit()));
    PT_ASSIGN_OR_RETURN(const EngineJobInfo info,
                        pools_->Submit(call.tenant, EngineJobKind::kStore, std::move(wanted)));
    v1::StorePagesResponse answer;
    JobToProto(info, answer.mutable_job());
    return answer;
  };
  auto answer = memos_->OncePerTenant<v1::StorePagesResponse>(
      call.tenant.name, request->request_id(), DigestOfMessage(*request), call.deadline, store);
  if (!answer.ok()) return ToGrpcStatus(answer.status());
  *response = *std::move(answer);
  return grpc::Status::OK;
}

grpc::Status EnginePoolServiceImpl::GetJob(grpc::ServerContext* context,
                                           const v1::GetJobRequest* request,
                                           v1::GetJobResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto info = pools_->Get(call.tenant, request->job_id());
  if (!info.ok()) return ToGrpcStatus(info.status());
  JobToProto(*info, response->mutable_job());
  return grpc::Status::OK;
}

grpc::Status EnginePoolServiceImpl::WatchJob(grpc::ServerContext* context,
                                             const v1::WatchJobRequest* request,
                                             grpc::ServerWriter<v1::WatchJobResponse>* writer) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const StreamDeadlines::Watch deadline(deadlines_, context, call.end, "watch engine job");
  const auto watch = [&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const auto slot, watches_.Take(call.tenant.name));
    int num_told = 0;
    return pools_->Watch(call.tenant, request->job_id(), call.deadline,
                         [&](const EngineJobInfo& info, bool is_news) {
                           if (context->IsCancelled()) return false;
                           if (!info.has_ended() && (!is_news || num_told >= kMaxWatchNews)) {
                             return true;
                           }
                           ++num_told;
                           v1::WatchJobResponse message;
                           JobToProto(info, message.mutable_job());
                           return writer->Write(message);
                         });
  };
  return ToGrpcStatus(watch());
}

grpc::Status EnginePoolServiceImpl::CancelJob(grpc::ServerContext* context,
                                              const v1::CancelJobRequest* request,
                                              v1::CancelJobResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  std::optional<MonotonicTime> deadline;
  if (request->wait()) deadline = call.deadline;
  const auto info = pools_->Cancel(call.tenant, request->job_id(), deadline);
  if (!info.ok()) return ToGrpcStatus(info.status());
  JobToProto(*info, response->mutable_job());
  return grpc::Status::OK;
}

}  // namespace pagetide
