// WorkerClient: the calls of SequenceService as tests need them, over plain generated stubs. Rows
// are derived from token and position, so that every byte read back can be checked without keeping
// what was sent. Thread-safe, as stubs are.
#ifndef PAGETIDE_TESTS_SUPPORT_WORKER_CLIENT_H_
#define PAGETIDE_TESTS_SUPPORT_WORKER_CLIENT_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "core/model.h"
#include "core/page_store.h"
#include "pagetide/v1/admin.grpc.pb.h"
#include "pagetide/v1/prefix.grpc.pb.h"
#include "pagetide/v1/sequence.grpc.pb.h"
#include "pagetide/v1/sequence_edit.grpc.pb.h"

namespace pagetide::testing {

// A small attention model: one full group, f32 rows of kv_heads × dim elements.
struct TestModelOptions {
  std::string name = "test-model";
  uint32_t page_tokens = 16;
  uint32_t num_layers = 2;
  uint32_t kv_heads = 2;
  uint32_t dim = 8;
  uint32_t vocabulary_size = 0;
  bool batch_invariant = false;
};
Model MakeTestModel(const TestModelOptions& options = {});
// Writes the record that RegisterModel would write.
absl::Status RegisterTestModel(const Model& model, PageStore* store);

// Row of one token in one layer: a function of (token, position, layer, kind) only.
std::string TestRow(const GroupGeometry& group, uint32_t token, uint64_t position, uint32_t layer,
                    RowKind kind);
// Rows of tokens[begin, end), one behind the other.
std::string TestRows(const GroupGeometry& group, const std::vector<uint32_t>& tokens,
                     uint64_t begin, uint64_t end, uint32_t layer, RowKind kind);

// What a page that is whole holds, or a state: a function of all tokens up to its last.
std::string TestPageBytes(const GroupGeometry& group, const std::vector<uint32_t>& tokens,
                          uint64_t end);

// `count` tokens that differ between seeds from the first on.
std::vector<uint32_t> TestTokens(uint64_t seed, size_t count);

class WorkerClient {
 public:
  WorkerClient(const std::string& address, std::shared_ptr<const Model> model);

  absl::StatusOr<v1::OpenSequenceResponse> Open(const std::vector<uint32_t>& prompt,
                                                const std::string& request_id = "");
  // Waits until the sequence is resident; returns its length.
  absl::StatusOr<uint64_t> WaitReady(const std::string& sequence_id);
  // Appends tokens[state.length(), end) with their rows, pages and states.
  absl::StatusOr<v1::AppendTokensResponse> Append(const v1::SequenceState& state,
                                                  const std::vector<uint32_t>& tokens, size_t end,
                                                  const std::string& request_id = "");
  // Number of bytes compared. DATA_LOSS when a row differs from what TestRow says, or a page from
  // what TestPageBytes says, or one is missing.
  absl::StatusOr<uint64_t> Verify(const std::string& sequence_id,
                                  const std::vector<uint32_t>& tokens, uint64_t begin,
                                  uint64_t end);
  absl::StatusOr<v1::ForkSequenceResponse> Fork(const v1::SequenceState& state, uint64_t length);
  absl::StatusOr<v1::RewindResponse> Rewind(const v1::SequenceState& state, int64_t length);
  absl::StatusOr<v1::SequenceState> Get(const std::string& sequence_id);
  absl::Status Close(const v1::SequenceState& state);
  // A metric of the worker, summed over its labels; 0 when it is not there. Metrics follow what
  // happened with the worker's next tick: see EventuallyStat.
  absl::StatusOr<double> Stat(const std::string& name);
  // True once the metric is at least `least`; false when it never came to that.
  bool EventuallyStat(const std::string& name, double least);

  // Pages of a group without rows, which hold tokens of [begin, end) among others; a state.
  absl::StatusOr<uint64_t> VerifyPages(const std::string& sequence_id, uint32_t group,
                                       const std::vector<uint32_t>& tokens, uint64_t begin,
                                       uint64_t end);

  v1::SequenceService::StubInterface& sequences() { return *sequences_; }
  v1::PrefixService::StubInterface& prefixes() { return *prefixes_; }
  v1::SequenceEditService::StubInterface& edits() { return *edits_; }
  v1::AdminService::StubInterface& admin() { return *admin_; }
  const Model& model() const { return *model_; }
  std::shared_ptr<grpc::Channel> channel() const { return channel_; }

 private:
  const std::shared_ptr<const Model> model_;  // shared with other clients of the test
  const std::shared_ptr<grpc::Channel> channel_;
  const std::unique_ptr<v1::SequenceService::Stub> sequences_;
  const std::unique_ptr<v1::PrefixService::Stub> prefixes_;
  const std::unique_ptr<v1::SequenceEditService::Stub> edits_;
  const std::unique_ptr<v1::AdminService::Stub> admin_;
};

// A context with a deadline.
class TestContext : public grpc::ClientContext {
 public:
  explicit TestContext(absl::Duration timeout = absl::Seconds(120));
};

}  // namespace pagetide::testing

#endif  // PAGETIDE_TESTS_SUPPORT_WORKER_CLIENT_H_
