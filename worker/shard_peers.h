// What the owner of a shard group calls the workers of the other ranks with: stubs, kept by address
// as a group is asked at every step, and one call to each of several ranks at once. Another worker
// is not trusted with more than its own part: what it says is checked and cut to what an answer may
// hold.
#ifndef PAGETIDE_WORKER_SHARD_PEERS_H_
#define PAGETIDE_WORKER_SHARD_PEERS_H_

#include <grpcpp/client_context.h>
#include <grpcpp/completion_queue.h>
#include <grpcpp/support/async_unary_call.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/clock.h"
#include "base/mutex.h"
#include "pagetide/v1/prefix.grpc.pb.h"
#include "pagetide/v1/sequence.grpc.pb.h"
#include "pagetide/v1/sequence_edit.grpc.pb.h"
#include "pagetide/v1/shard_group.grpc.pb.h"
#include "rpc/status_mapping.h"

namespace pagetide {

// The worker of another rank. Thread-safe, as stubs are.
struct ShardPeer {
  explicit ShardPeer(const std::string& address);
  std::unique_ptr<v1::PrefixService::Stub> prefixes;
  std::unique_ptr<v1::SequenceService::Stub> sequences;
  std::unique_ptr<v1::SequenceEditService::Stub> edits;
  std::unique_ptr<v1::ShardGroupService::Stub> groups;
};

// The last used ones; a connection is made by the first call. Thread-safe.
class ShardPeers {
 public:
  explicit ShardPeers(size_t max_peers = 1024) : max_peers_(max_peers) {}
  // Shared with the calls that use it when another takes its place.
  std::shared_ptr<ShardPeer> At(const std::string& address);
  size_t size() const;

 private:
  using Entry = std::pair<std::string, std::shared_ptr<ShardPeer>>;

  const size_t max_peers_;
  mutable Mutex mu_;
  std::list<Entry> by_use_ ABSL_GUARDED_BY(mu_);  // least recently used first
  absl::flat_hash_map<std::string, std::list<Entry>::iterator> peers_ ABSL_GUARDED_BY(mu_);
};

// An error of a rank: the text names the rank and the address, the rest stays, but that a
// STALE_EPOCH is the rank's and not the group's: SHARD_STALE, metadata rank.
absl::Status ErrorOfRank(uint32_t rank, absl::string_view address, const absl::Status& status);

// What a rank said, cut to what may stand in an answer: numbers, and texts of bounded size.
// INTERNAL, with rank and address, unless the state has the id of a sequence, and `sequence_id`
// if that is not empty.
absl::Status CheckState(uint32_t rank, absl::string_view address, absl::string_view sequence_id,
                        v1::SequenceState* state);
void CutReuse(v1::PrefixReuse* reuse);

// How many bytes of requests to other ranks are held at once. Nobody waits. Thread-safe; outlives
// what was taken.
class RequestBudget {
 public:
  explicit RequestBudget(uint64_t max_bytes) : max_bytes_(max_bytes) {}
  // Held for as long as the object lives.
  class Held {
   public:
    ~Held();
    Held(const Held&) = delete;
    Held& operator=(const Held&) = delete;

   private:
    friend class RequestBudget;
    Held(RequestBudget* budget, uint64_t num_bytes) : budget_(budget), num_bytes_(num_bytes) {}
    RequestBudget* const budget_;
    const uint64_t num_bytes_;
  };
  // RESOURCE_EXHAUSTED (TOO_MANY_SHARD_GROUP_CALLS) with the numbers and a retry delay, unless
  // nobody else holds any.
  absl::StatusOr<std::unique_ptr<Held>> Take(uint64_t num_bytes);

 private:
  const uint64_t max_bytes_;
  Mutex mu_;
  uint64_t held_bytes_ ABSL_GUARDED_BY(mu_) = 0;
};

// One call to each of some ranks, all at once. For one thread. Its end cancels what still runs.
template <typename Response>
class RankCalls {
 public:
  struct Answer {
    uint32_t rank = 0;
    // Errors: see ErrorOfRank.
    absl::StatusOr<Response> response;
  };

  RankCalls(ShardPeers* peers, const Clock* clock) : peers_(peers), clock_(clock) {}
  ~RankCalls() {
    for (const auto& call : calls_) call->context.TryCancel();
    Wait(nullptr);
    queue_.Shutdown();
    void* tag = nullptr;
    bool is_ok = false;
    while (queue_.Next(&tag, &is_ok)) {
    }
  }
  RankCalls(const RankCalls&) = delete;
  RankCalls& operator=(const RankCalls&) = delete;

  template <typename Stub, typename Request>
  void Start(uint32_t rank, const std::string& address, std::unique_ptr<Stub> ShardPeer::*stub,
             std::unique_ptr<grpc::ClientAsyncResponseReader<Response>> (Stub::*method)(
                 grpc::ClientContext*, const Request&, grpc::CompletionQueue*),
             const Request& request, MonotonicTime deadline) {
    Call& call = *calls_.emplace_back(std::make_unique<Call>());
    call.rank = rank;
    call.address = address;
    call.peer = peers_->At(address);
    call.context.set_deadline(std::chrono::system_clock::now() +
                              absl::ToChronoMicroseconds(deadline - clock_->MonotonicNow()));
    call.reader = (*(*call.peer.*stub).*method)(&call.context, request, &queue_);
    call.reader->StartCall();
    call.reader->Finish(&call.response, &call.status, &call);
    ++num_running_;
  }

  // Each call ends by its deadline at the latest, and all soon after `is_cancelled`, which may be
  // null, says so. Answers in the order of the starts; once.
  std::vector<Answer> Wait(const std::function<bool()>& is_cancelled) {
    while (num_running_ > 0) {
      void* tag = nullptr;
      bool is_ok = false;
      const auto next =
          queue_.AsyncNext(&tag, &is_ok, std::chrono::system_clock::now() + kLookForCancel);
      if (next == grpc::CompletionQueue::GOT_EVENT) {
        --num_running_;
      } else if (is_cancelled && is_cancelled()) {
        for (const auto& call : calls_) call->context.TryCancel();
      }
    }
    std::vector<Answer> answers;
    for (const auto& call : calls_) {
      const absl::Status status = FromGrpcStatus(call->status);
      Answer& answer = answers.emplace_back();
      answer.rank = call->rank;
      if (status.ok()) {
        answer.response = std::move(call->response);
      } else {
        answer.response = ErrorOfRank(call->rank, call->address, status);
      }
    }
    calls_.clear();
    return answers;
  }

 private:
  static constexpr std::chrono::milliseconds kLookForCancel{50};
  struct Call {
    uint32_t rank = 0;
    std::string address;
    std::shared_ptr<ShardPeer> peer;  // see ShardPeers::At
    grpc::ClientContext context;
    Response response;
    grpc::Status status;
    std::unique_ptr<grpc::ClientAsyncResponseReader<Response>> reader;
  };

  ShardPeers* const peers_;
  const Clock* const clock_;
  grpc::CompletionQueue queue_;
  std::vector<std::unique_ptr<Call>> calls_;
  size_t num_running_ = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_SHARD_PEERS_H_
