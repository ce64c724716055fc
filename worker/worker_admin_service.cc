#include "worker/worker_admin_service.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <limits>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "rpc/status_mapping.h"

namespace pagetide {
namespace {

// Of one answer, of at most 90 bytes each.
constexpr uint32_t kMaxFrames = 16384;

// Resident bytes of this process; 0 where the system does not tell.
uint64_t ResidentSetBytes() {
  FILE* file = fopen("/proc/self/statm", "re");
  if (file == nullptr) return 0;
  unsigned long long total = 0;
  unsigned long long resident = 0;
  const int fields = fscanf(file, "%llu %llu", &total, &resident);
  fclose(file);
  return fields == 2 ? resident * static_cast<uint64_t>(sysconf(_SC_PAGESIZE)) : 0;
}

std::vector<std::string> Capabilities(absl::string_view device, const LocalPlane* local_plane) {
  std::vector<std::string> capabilities = {absl::StrCat("device:", device), "format:native",
                                           "format:llama_cpp", "format:mlx", "format:llama_sharp"};
  if (local_plane != nullptr) {
    capabilities.push_back("local_plane");
    capabilities.push_back("engine_memory:memfd");
  }
  return capabilities;
}

}  // namespace

WorkerAdminService::WorkerAdminService(Worker* worker, const LocalPlane* local_plane)
    : AdminServiceCommon("worker", Capabilities(worker->device_name(), local_plane),
                         &worker->metrics()),
      worker_(worker),
      local_plane_(local_plane),
      executor_({.name = "admin", .num_threads = 1, .max_queue = 64}) {}

grpc::ServerUnaryReactor* WorkerAdminService::Run(grpc::CallbackServerContext* context,
                                                  std::function<absl::Status()> call) {
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  const absl::Status scheduled = executor_.Schedule(
      [reactor, call = std::move(call)] { reactor->Finish(ToGrpcStatus(call())); });
  if (!scheduled.ok()) reactor->Finish(ToGrpcStatus(scheduled));
  return reactor;
}

grpc::ServerUnaryReactor* WorkerAdminService::GetMemoryBreakdown(
    grpc::CallbackServerContext* context, const v1::GetMemoryBreakdownRequest*,
    v1::GetMemoryBreakdownResponse* response) {
  return Run(context, [this, response] {
    Breakdown(response);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* WorkerAdminService::DumpFrames(grpc::CallbackServerContext* context,
                                                         const v1::DumpFramesRequest* request,
                                                         v1::DumpFramesResponse* response) {
  return Run(context, [this, request, response] { return Dump(*request, response); });
}

grpc::ServerUnaryReactor* WorkerAdminService::EvictPages(grpc::CallbackServerContext* context,
                                                         const v1::EvictPagesRequest* request,
                                                         v1::EvictPagesResponse* response) {
  return Run(context, [this, call = MakeCallContext(*context, *worker_), request, response] {
    return Evict(call, *request, response);
  });
}

grpc::ServerUnaryReactor* WorkerAdminService::ClearCache(grpc::CallbackServerContext* context,
                                                         const v1::ClearCacheRequest* request,
                                                         v1::ClearCacheResponse* response) {
  return Run(context, [this, request, response]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const std::vector<ModelHost*> hosts, HostsOf(request->model_digest()));
    uint64_t dropped = 0;
    for (ModelHost* host : hosts) dropped += host->ClearCache(request->zero_data());
    response->set_dropped_pages(dropped);
    return absl::OkStatus();
  });
}

absl::StatusOr<std::vector<ModelHost*>> WorkerAdminService::HostsOf(
    const std::string& model_digest) const {
  if (model_digest.empty()) return worker_->Hosts();
  ModelHost* host = worker_->FindHost(model_digest);
  if (host != nullptr) return std::vector<ModelHost*>{host};
  return WithReason(
      absl::NotFoundError(absl::StrCat("model_digest: no pool for it on worker ", worker_->id())),
      "MODEL_NOT_FOUND");
}

void WorkerAdminService::Breakdown(v1::GetMemoryBreakdownResponse* response) const {
  for (ModelHost* host : worker_->Hosts()) {
    for (const PoolUsage& usage : host->Usage()) {
      v1::GetMemoryBreakdownResponse::Pool* pool = response->add_pools();
      pool->set_model_digest(host->model().digest().ToHex());
      pool->set_group(usage.group);
      pool->set_tier(v1::TIER_DEVICE);
      pool->set_page_bytes(usage.page_bytes);
      pool->set_num_frames(usage.num_frames);
      pool->set_free_frames(usage.free_frames);
      pool->set_pinned_frames(usage.pinned_frames);
      pool->set_evictable_frames(usage.evictable_frames);
      pool->set_tail_frames(usage.tail_frames);
    }
  }
  if (local_plane_ != nullptr) {
    response->set_staging_bytes(local_plane_->staging_bytes());
    response->set_staging_high_water_bytes(local_plane_->staging_high_water_bytes());
  }
  response->set_resident_set_bytes(ResidentSetBytes());
}

absl::Status WorkerAdminService::Dump(const v1::DumpFramesRequest& request,
                                      v1::DumpFramesResponse* response) const {
  if (request.model_digest().empty()) {
    return absl::InvalidArgumentError("model_digest is empty, must name one model");
  }
  PT_ASSIGN_OR_RETURN(const std::vector<ModelHost*> hosts, HostsOf(request.model_digest()));
  const uint32_t num_groups = hosts[0]->model().geometry().num_groups();
  if (request.group() >= num_groups) {
    return absl::InvalidArgumentError(
        absl::StrCat("group is ", request.group(), ", the model has ", num_groups));
  }
  PT_ASSIGN_OR_RETURN(const uint32_t limit, ListSize(request.page_size(), kMaxFrames, kMaxFrames));
  uint64_t after = 0;
  if (!request.page_token().empty()) {
    PT_ASSIGN_OR_RETURN(const auto token, ParsePageToken<1>(request.page_token()));
    after = std::min<uint64_t>(token[0], std::numeric_limits<uint32_t>::max());
  }
  // One more than fits tells whether there is more.
  const std::vector<FrameEntry> frames =
      hosts[0]->DumpFrames(request.group(), static_cast<uint32_t>(after), limit + 1);
  for (const FrameEntry& entry : std::span(frames).first(std::min<size_t>(frames.size(), limit))) {
    v1::DumpFramesResponse::Frame* frame = response->add_frames();
    frame->set_frame(entry.frame.value());
    frame->set_state(entry.state);
    frame->set_page_id(entry.page.value());
    frame->set_rows(entry.rows);
    frame->set_references(entry.references);
    frame->set_pins(entry.pins);
    if (entry.key.has_value()) frame->set_page_key(entry.key->digest.ToBytes());
    frame->set_stored(entry.is_stored);
  }
  if (frames.size() > limit) {
    response->set_next_page_token(MakePageToken({frames[limit - 1].frame.value()}));
  }
  return absl::OkStatus();
}

absl::Status WorkerAdminService::Evict(const CallContext& call,
                                       const v1::EvictPagesRequest& request,
                                       v1::EvictPagesResponse* response) const {
  PT_ASSIGN_OR_RETURN(const std::vector<ModelHost*> hosts, HostsOf(request.model_digest()));
  uint64_t left = request.max_pages();
  for (ModelHost* host : hosts) {
    PT_ASSIGN_OR_RETURN(const ModelHost::EvictResult result, host->EvictPages(left, call.deadline));
    response->set_spilled_pages(response->spilled_pages() + result.spilled_pages);
    response->set_evicted_pages(response->evicted_pages() + result.evicted_pages);
    if (request.max_pages() == 0) continue;
    if (result.evicted_pages >= left) break;
    left -= result.evicted_pages;
  }
  return absl::OkStatus();
}

}  // namespace pagetide
