// A pagetide-worker as a child, with a store of its own in a folder, and a client of it: what the
// cases of the features need that are checked through real processes.
#ifndef PAGETIDE_TESTS_CONFORMANCE_WORKER_PROCESS_H_
#define PAGETIDE_TESTS_CONFORMANCE_WORKER_PROCESS_H_

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kvstore/rocksdb_page_store.h"
#include "rpc/status_mapping.h"
#include "tests/conformance/assert_ok.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"

namespace pagetide::testing {

class WorkerProcessFixture : public ::testing::Test {
 protected:
  // `spare_bytes` of the budget are less than a page. What leaves the frames is gone, unless
  // something else keeps it: full pages are not written through.
  absl::Status Start(std::shared_ptr<const Model> model, uint64_t frames,
                     uint64_t spare_bytes = 0) {
    model_ = std::move(model);
    {
      PT_ASSIGN_OR_RETURN(const auto store, RocksdbPageStore::Open({.dir = dir_ / "store"}));
      PT_RETURN_IF_ERROR(RegisterTestModel(*model_, store.get()));
    }
    return StartWorker(frames * model_->geometry().bytes_per_page_of_tokens() + spare_bytes);
  }
  absl::Status StartWorker(uint64_t pool_bytes) {
    std::vector<std::string> args = {
        "--store-dir",           dir_ / "store",
        "--write-through=false", absl::StrCat("--pool-bytes=", pool_bytes),
        "--listen=127.0.0.1:0",  "--metrics-listen=127.0.0.1:0"};
    args.insert(args.end(), more_flags_.begin(), more_flags_.end());
    PT_ASSIGN_OR_RETURN(worker_, ChildProcess::Start({.program = "pagetide-worker", .args = args}));
    client_ = std::make_unique<WorkerClient>(worker_->Address("grpc"), model_);
    return absl::OkStatus();
  }
  // The worker is alive and stops cleanly, whatever the test did to it.
  void TearDown() override {
    client_.reset();
    if (worker_ == nullptr) return;
    EXPECT_TRUE(worker_->IsRunning());
    EXPECT_EQ(worker_->Terminate().value_or(-1), 0);
  }

  // A sequence that looked up nothing, as if it had been opened before anybody committed.
  absl::StatusOr<v1::SequenceState> OpenAlone() {
    TestContext context;
    v1::OpenSequenceRequest request;
    request.set_model_digest(model_->digest().ToHex());
    request.set_no_reuse(true);
    v1::OpenSequenceResponse response;
    PT_RETURN_IF_ERROR(
        FromGrpcStatus(client_->sequences().OpenSequence(&context, request, &response)));
    return response.state();
  }
  absl::StatusOr<v1::SequenceState> OpenAndFill(const std::vector<uint32_t>& tokens) {
    PT_ASSIGN_OR_RETURN(const v1::SequenceState state, OpenAlone());
    PT_ASSIGN_OR_RETURN(const auto appended, client_->Append(state, tokens, tokens.size()));
    return appended.state();
  }
  absl::StatusOr<v1::GetBlockTableResponse> BlockTable(const v1::SequenceState& state) {
    TestContext context;
    v1::GetBlockTableRequest request;
    request.set_sequence_id(state.sequence_id());
    v1::GetBlockTableResponse table;
    PT_RETURN_IF_ERROR(
        FromGrpcStatus(client_->sequences().GetBlockTable(&context, request, &table)));
    return table;
  }
  absl::StatusOr<uint64_t> ReusedTokens(const std::vector<uint32_t>& tokens) {
    TestContext context;
    v1::LookupPrefixRequest request;
    request.set_model_digest(model_->digest().ToHex());
    request.mutable_tokens()->Add(tokens.begin(), tokens.end());
    v1::LookupPrefixResponse response;
    PT_RETURN_IF_ERROR(
        FromGrpcStatus(client_->prefixes().LookupPrefix(&context, request, &response)));
    return response.reuse().reused_tokens();
  }
  static void Refer(const v1::SequenceState& state, v1::SequenceRef* ref) {
    ref->set_sequence_id(state.sequence_id());
    ref->set_epoch(state.epoch());
  }

  std::vector<std::string> more_flags_;  // of the worker that is started next
  TempDir dir_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<ChildProcess> worker_;
  std::unique_ptr<WorkerClient> client_;
};

}  // namespace pagetide::testing

#endif  // PAGETIDE_TESTS_CONFORMANCE_WORKER_PROCESS_H_
