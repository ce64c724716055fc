// A worker with sessions over a store that it may share with others, and the calls an engine makes.
#ifndef PAGETIDE_TESTS_WORKER_SESSION_FIXTURE_H_
#define PAGETIDE_TESTS_WORKER_SESSION_FIXTURE_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/worker/model_host_fixture.h"
#include "worker/sessions.h"
#include "worker/worker.h"
#include "worker/worker_fence.h"

namespace pagetide {

class SessionWorker {
 public:
  struct Setup {
    std::string id = "a";
    uint64_t incarnation = 1;
    uint32_t page_tokens = 16;
    int num_groups = 1;
    uint32_t num_frames = 16;
    bool write_through = true;
    Clock* lease_clock = Clock::Real();
    std::shared_ptr<const Model> model;  // null: TestModel
  };
  SessionWorker(PageStore* store, const Setup& setup)
      : lease_({.name = absl::StrCat("worker/", setup.id), .incarnation = setup.incarnation}, store,
               setup.lease_clock),
        fence_(setup.id, setup.incarnation, &lease_, store) {
    Worker::Options options;
    options.id = setup.id;
    options.incarnation = setup.incarnation;
    const auto model =
        setup.model != nullptr ? setup.model : TestModel(setup.page_tokens, setup.num_groups);
    options.model_pool_bytes = setup.num_frames * model->geometry().bytes_per_page_of_tokens();
    options.pool_bytes = 2 * options.model_pool_bytes;
    options.deployment_secret = "secret";
    options.host.write_through = setup.write_through;
    options.host.store_backoff = absl::Milliseconds(20);
    worker_ = Worker::Create(options, {.device = &device_,
                                       .store = store,
                                       .io = &io_,
                                       .clock = Clock::Real(),
                                       .metrics = &metrics})
                  .value();
    ModelHost* const host = worker_->AddModel(*model, HostUnderTest::Soon()).value();
    engine = std::make_unique<HostUnderTest>(HostUnderTest::Setup{.page_tokens = setup.page_tokens,
                                                                  .num_groups = setup.num_groups,
                                                                  .num_frames = setup.num_frames,
                                                                  .store = store,
                                                                  .model = model,
                                                                  .existing = host});
    lease_.Step();
    sessions = std::make_unique<Sessions>(worker_.get(), store, &fence_);
  }

  const Tenant& tenant() const { return engine->tenant; }
  ModelHost* host() { return engine->host; }
  StoreLeaseKeeper& lease() { return lease_; }
  WorkerFence& fence() { return fence_; }
  Worker& worker() { return *worker_; }

  SaveRequest Request(const SequenceInfo& info, const std::string& name) {
    return {.sequence = {info.id, info.epoch, std::nullopt}, .name = name};
  }
  absl::StatusOr<SaveAnswer> Save(const SequenceInfo& info, const std::string& name) {
    return sessions->Save(tenant(), host(), Request(info, name), HostUnderTest::Soon());
  }
  absl::StatusOr<LoadedSession> Load(const std::string& name,
                                     std::optional<uint64_t> length = std::nullopt) {
    return sessions->Load(tenant(), name, std::nullopt, "", length, HostUnderTest::Soon());
  }

  InMemoryMetrics metrics;

 private:
  CpuDevice device_;
  ThreadPoolExecutor io_{{.name = "io", .num_threads = 2, .max_queue = 1024}};
  StoreLeaseKeeper lease_;
  WorkerFence fence_;
  std::unique_ptr<Worker> worker_;

 public:
  std::unique_ptr<HostUnderTest> engine;
  std::unique_ptr<Sessions> sessions;
};

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_WORKER_SESSION_FIXTURE_H_
