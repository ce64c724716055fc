// Client: the way into a PageTide fleet for a C++ program. It asks a router where a prompt goes,
// opens it there, and talks to that worker directly; rows go through shared memory where the worker
// is on this host (clients/cpp/sequence.h).
//
//   auto client = Client::Create({.router_address = "127.0.0.1:7070"}).value();
//   auto model = client->RegisterModel(spec).value();
//   auto sequence = client->Open(model, prompt).value();
//   sequence->WaitReady();                      // reused pages that were in the store are here now
//   … compute prompt[sequence->length() ..), append …
//
// Thread-safe. Sequences keep what they need: they may outlive the client.
#ifndef PAGETIDE_CLIENTS_CPP_CLIENT_H_
#define PAGETIDE_CLIENTS_CPP_CLIENT_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/mutex.h"
#include "clients/cpp/sequence.h"
#include "clients/cpp/worker_connection.h"
#include "core/model.h"
#include "pagetide/v1/router.grpc.pb.h"

namespace pagetide {

struct ClientOptions {
  // Either a router, or one worker without a router.
  std::string router_address;
  std::string worker_address;
  std::string worker_local_socket;  // of worker_address; empty: rows go by RPC
  // Bounds each call, and each attempt to open on one worker.
  CallOptions call;
  // Workers tried before Open gives up.
  int max_assignments = 3;
  // False: rows go by RPC although the worker is on this host.
  bool use_local_plane = true;
  // Shared memory asked of each worker on this host.
  uint64_t staging_bytes = 4 << 20;
  // For how long a step's slots are held, and its rows may be written: above 0, at most 5 minutes.
  absl::Duration step_lease = absl::Seconds(30);
  ChannelOptions channel;

  // INVALID_ARGUMENT unless exactly one of router_address and worker_address is set, and for a
  // step_lease out of its range.
  absl::Status Validate() const;
};

struct OpenOptions {
  // Reuse even the last token of the prompt (engines usually need its logits).
  bool allow_full_reuse = false;
  // Reuse nothing, to measure.
  bool no_reuse = false;
  // Stay with this worker if it is alive: a conversation's next turn.
  std::string sticky_worker_id;
  std::vector<std::string> exclude_worker_ids;
  // Sessions that may serve as the prompt's beginning, besides what is found by keys (at most 16).
  std::vector<std::string> sessions;
  // > 0: also runs of at least so many tokens of a session that stand elsewhere in the prompt.
  // Approximate: see PrefixService.PlanPrompt.
  uint32_t min_chunk_tokens = 0;
  // What decides rows besides the tokens in front of them (images), ascending. BeginAppend takes
  // those of the tokens that it appends again.
  std::vector<PositionedInput> inputs;
};

struct LoadOptions {
  std::optional<uint64_t> version;  // absent: the current one
  std::optional<uint64_t> length;   // the first so many tokens only
  // Load on this worker if it is alive.
  std::string sticky_worker_id;
};

struct LoadedSequence {
  std::unique_ptr<Sequence> sequence;
  v1::SessionInfo session;
  std::vector<uint32_t> tokens;  // of the sequence
};

class Client {
 public:
  static absl::StatusOr<std::unique_ptr<Client>> Create(ClientOptions options);

  // Idempotent. FAILED_PRECONDITION without a router, which is who keeps models.
  absl::StatusOr<std::shared_ptr<const Model>> RegisterModel(const ModelSpec& spec);
  // By digest or name. NOT_FOUND.
  absl::StatusOr<std::shared_ptr<const Model>> FindModel(absl::string_view name_or_digest);

  // Opens `prompt` on the worker that can start it soonest. Does not wait for restores; the
  // sequence's length is what was reused. A worker that does not answer is left out and another one
  // asked for.
  absl::StatusOr<std::unique_ptr<Sequence>> Open(std::shared_ptr<const Model> model,
                                                 std::span<const uint32_t> prompt,
                                                 const OpenOptions& options = {});

  // A new sequence with what was saved under `name`, on the worker that has most of it. Does not
  // wait for restores. NOT_FOUND; FAILED_PRECONDITION (MODEL_MISMATCH) says what differs.
  absl::StatusOr<LoadedSequence> LoadSession(std::shared_ptr<const Model> model,
                                             absl::string_view name,
                                             const LoadOptions& options = {});
  // What a session holds; with its token ids if asked for.
  absl::StatusOr<v1::PeekSessionResponse> PeekSession(absl::string_view name,
                                                      bool with_tokens = false);
  // All sessions whose names begin with `prefix`, in order.
  absl::StatusOr<std::vector<v1::SessionInfo>> ListSessions(absl::string_view prefix = "");
  // Returns the version that was deleted. expected_version absent: whatever is there.
  absl::StatusOr<uint64_t> DeleteSession(absl::string_view name,
                                         std::optional<uint64_t> expected_version = std::nullopt);

  // Opens a parked sequence under its id, or one of a worker that died, as it was parked last. On
  // the worker of a client without a router, else on one that serves.
  absl::StatusOr<std::unique_ptr<Sequence>> Resume(std::shared_ptr<const Model> model,
                                                   absl::string_view sequence_id);
  // Lets the store evict what Sequence::Pin kept. NOT_FOUND (PIN_NOT_FOUND).
  absl::Status Unpin(absl::string_view name);
  // All pins whose names begin with `prefix`, in order.
  absl::StatusOr<std::vector<v1::PinInfo>> ListPins(absl::string_view prefix = "");

  // Workers as the router knows them. FAILED_PRECONDITION without a router.
  absl::StatusOr<std::vector<v1::WorkerInfo>> ListWorkers();
  // The connection to a worker, made or found. local_socket may be empty.
  std::shared_ptr<WorkerConnection> ConnectWorker(absl::string_view address,
                                                  absl::string_view local_socket = "");
  // Null without a router.
  v1::RouterService::StubInterface* router() const { return router_.get(); }

 private:
  explicit Client(ClientOptions options);
  absl::StatusOr<std::unique_ptr<Sequence>> OpenOn(std::shared_ptr<WorkerConnection> worker,
                                                   std::shared_ptr<const Model> model,
                                                   std::span<const uint32_t> prompt,
                                                   const OpenOptions& options,
                                                   absl::string_view assignment_id);

  // Any worker that serves: all of them see all sessions.
  absl::StatusOr<std::shared_ptr<WorkerConnection>> AnyWorker();
  absl::StatusOr<LoadedSequence> LoadOn(std::shared_ptr<WorkerConnection> worker,
                                        std::shared_ptr<const Model> model, absl::string_view name,
                                        const LoadOptions& options);

  const ClientOptions options_;
  const std::unique_ptr<v1::RouterService::StubInterface> router_;

  Mutex mu_;
  // By address. Bounded by the fleet: dead addresses cost an idle channel.
  std::map<std::string, std::shared_ptr<WorkerConnection>> workers_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_CLIENTS_CPP_CLIENT_H_
