#include "worker/worker_admin_service.h"

#include <unistd.h>

#include <cstdio>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "rpc/status_mapping.h"
#include "worker/service_support.h"

#ifndef PAGETIDE_VERSION
#define PAGETIDE_VERSION "unknown"
#endif
#ifndef PAGETIDE_REVISION
#define PAGETIDE_REVISION "unknown"
#endif

namespace pagetide {
namespace {

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

}  // namespace

absl::StatusOr<std::vector<ModelHost*>> WorkerAdminService::HostsOf(
    const std::string& model_digest) const {
  if (model_digest.empty()) return worker_->Hosts();
  ModelHost* host = worker_->FindHost(model_digest);
  if (host != nullptr) return std::vector<ModelHost*>{host};
  return WithReason(
      absl::NotFoundError(absl::StrCat("model_digest: no pool for it on worker ", worker_->id())),
      "MODEL_NOT_FOUND");
}

grpc::Status WorkerAdminService::GetBuildInfo(grpc::ServerContext*, const v1::GetBuildInfoRequest*,
                                              v1::GetBuildInfoResponse* response) {
  response->set_version(PAGETIDE_VERSION);
  response->set_revision(PAGETIDE_REVISION);
#ifdef NDEBUG
  response->set_build_type("optimized");
#else
  response->set_build_type("debug");
#endif
  response->set_compiler(__VERSION__);
  return grpc::Status::OK;
}

grpc::Status WorkerAdminService::GetCapabilities(grpc::ServerContext*,
                                                 const v1::GetCapabilitiesRequest*,
                                                 v1::GetCapabilitiesResponse* response) {
  response->set_role("worker");
  response->add_capabilities("attend");
  response->add_capabilities("fork");
  response->add_capabilities("rewind");
  if (local_plane_ != nullptr) response->add_capabilities("local_plane");
  return grpc::Status::OK;
}

grpc::Status WorkerAdminService::GetMemoryBreakdown(grpc::ServerContext*,
                                                    const v1::GetMemoryBreakdownRequest*,
                                                    v1::GetMemoryBreakdownResponse* response) {
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
  return grpc::Status::OK;
}

grpc::Status WorkerAdminService::GetStats(grpc::ServerContext*, const v1::GetStatsRequest*,
                                          v1::GetStatsResponse* response) {
  for (const MetricSample& sample : worker_->metrics().Snapshot()) {
    (*response->mutable_values())[FormatMetricName(sample.name, sample.labels)] = sample.value;
  }
  return grpc::Status::OK;
}

grpc::Status WorkerAdminService::DumpFrames(grpc::ServerContext*,
                                            const v1::DumpFramesRequest* request,
                                            v1::DumpFramesResponse* response) {
  const auto dump = [&]() -> absl::Status {
    if (request->model_digest().empty()) {
      return absl::InvalidArgumentError("model_digest is empty, must name one model");
    }
    PT_ASSIGN_OR_RETURN(const std::vector<ModelHost*> hosts, HostsOf(request->model_digest()));
    const uint32_t num_groups = hosts[0]->model().geometry().num_groups();
    if (request->group() >= num_groups) {
      return absl::InvalidArgumentError(
          absl::StrCat("group is ", request->group(), ", the model has ", num_groups));
    }
    for (const FrameEntry& entry : hosts[0]->DumpFrames(request->group())) {
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
    return absl::OkStatus();
  };
  return ToGrpcStatus(dump());
}

grpc::Status WorkerAdminService::EvictPages(grpc::ServerContext* context,
                                            const v1::EvictPagesRequest* request,
                                            v1::EvictPagesResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto evict = [&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const std::vector<ModelHost*> hosts, HostsOf(request->model_digest()));
    uint64_t left = request->max_pages();
    for (ModelHost* host : hosts) {
      PT_ASSIGN_OR_RETURN(const ModelHost::EvictResult result,
                          host->EvictPages(left, call.deadline));
      response->set_spilled_pages(response->spilled_pages() + result.spilled_pages);
      response->set_evicted_pages(response->evicted_pages() + result.evicted_pages);
      if (request->max_pages() == 0) continue;
      if (result.evicted_pages >= left) break;
      left -= result.evicted_pages;
    }
    return absl::OkStatus();
  };
  return ToGrpcStatus(evict());
}

grpc::Status WorkerAdminService::ClearCache(grpc::ServerContext*,
                                            const v1::ClearCacheRequest* request,
                                            v1::ClearCacheResponse* response) {
  const auto hosts = HostsOf(request->model_digest());
  if (!hosts.ok()) return ToGrpcStatus(hosts.status());
  uint64_t dropped = 0;
  for (ModelHost* host : *hosts) dropped += host->ClearCache();
  response->set_dropped_pages(dropped);
  return grpc::Status::OK;
}

grpc::Status WorkerAdminService::SetLogLevel(grpc::ServerContext*,
                                             const v1::SetLogLevelRequest* request,
                                             v1::SetLogLevelResponse*) {
  return ToGrpcStatus(pagetide::SetLogLevel(request->level()));
}

}  // namespace pagetide
