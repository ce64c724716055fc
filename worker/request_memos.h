// RequestMemos: makes mutating calls idempotent by their request_id. The first answer is kept (the
// last 32 a sequence; 10,000 and 64 MiB a tenant, for 10 minutes) and given again to a repeat with
// the same body; the same id with another body is INVALID_ARGUMENT (REQUEST_ID_REUSED). Only
// successes are kept: a call that failed changed nothing and may be tried again. A repeat that
// comes while the first still runs waits for it. Without a request_id nothing is kept.
//
// Answers belong to the tenant that asked: no other gets them, or learns of them, whatever sequence
// it names.
//
// Thread-safe. The clock outlives it.
#ifndef PAGETIDE_WORKER_REQUEST_MEMOS_H_
#define PAGETIDE_WORKER_REQUEST_MEMOS_H_

#include <list>
#include <memory>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/byte_size.h"
#include "base/clock.h"
#include "base/digest.h"
#include "base/mutex.h"
#include "core/request_memo.h"

namespace pagetide {

class RequestMemos {
 public:
  struct Options {
    RequestMemo::Options per_tenant;
    RequestMemo::Options per_sequence{
        .max_entries = 32, .max_bytes = kMiB, .ttl = absl::InfiniteDuration()};
    // Memos of sequences and tenants together, and what they hold; the least recently used is
    // dropped first.
    size_t max_scopes = 200'000;
    size_t max_bytes = 256 * kMiB;
  };

  RequestMemos(Options options, Clock* clock) : options_(options), clock_(clock) {}

  // Response is a protobuf message. DEADLINE_EXCEEDED when the first call with this id still runs
  // then.
  template <typename Response>
  absl::StatusOr<Response> OncePerTenant(absl::string_view tenant, absl::string_view request_id,
                                         const Digest& body, MonotonicTime deadline,
                                         absl::FunctionRef<absl::StatusOr<Response>()> call) {
    return Once<Response>(Scope::kTenant, tenant, request_id, body, deadline, call);
  }
  template <typename Response>
  absl::StatusOr<Response> OncePerSequence(absl::string_view tenant, absl::string_view sequence_id,
                                           absl::string_view request_id, const Digest& body,
                                           MonotonicTime deadline,
                                           absl::FunctionRef<absl::StatusOr<Response>()> call) {
    return Once<Response>(Scope::kSequence, SequenceScope(tenant, sequence_id), request_id, body,
                          deadline, call);
  }

  // Drops what is kept for a closed sequence.
  void ForgetSequence(absl::string_view tenant, absl::string_view sequence_id);

  // Memos, and what they hold.
  size_t num_scopes() const;
  size_t num_bytes() const;

 private:
  enum class Scope : char { kTenant = 't', kSequence = 's' };
  struct ScopedMemo {
    // Shared with the calls that use it when the scope is dropped.
    std::shared_ptr<RequestMemo> memo;
    std::list<std::string>::iterator by_use;
    size_t num_bytes = 0;
  };

  static std::string SequenceScope(absl::string_view tenant, absl::string_view sequence_id) {
    return absl::StrCat(tenant.size(), ":", tenant, sequence_id);
  }

  template <typename Response>
  absl::StatusOr<Response> Once(Scope scope, absl::string_view name, absl::string_view request_id,
                                const Digest& body, MonotonicTime deadline,
                                absl::FunctionRef<absl::StatusOr<Response>()> call) {
    if (request_id.empty()) return call();
    const auto run = [&]() -> absl::StatusOr<std::string> {
      absl::StatusOr<Response> response = call();
      if (!response.ok()) return response.status();
      return response->SerializeAsString();
    };
    absl::StatusOr<std::string> bytes = Run(scope, name, request_id, body, deadline, run);
    if (!bytes.ok()) return bytes.status();
    Response response;
    if (!response.ParseFromString(*bytes)) {
      return absl::InternalError("a remembered answer cannot be read");
    }
    return response;
  }
  absl::StatusOr<std::string> Run(Scope scope, absl::string_view name, absl::string_view request_id,
                                  const Digest& body, MonotonicTime deadline,
                                  absl::FunctionRef<absl::StatusOr<std::string>()> call);
  // Of a scope in which something succeeded; else null.
  std::shared_ptr<RequestMemo> FindMemo(const std::string& key) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Remember(Scope scope, const std::string& key, absl::string_view request_id,
                const Digest& body, const std::string& answer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Drop(absl::flat_hash_map<std::string, ScopedMemo>::iterator at)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Options options_;
  Clock* const clock_;
  mutable Mutex mu_;
  CondVar finished_;
  absl::flat_hash_map<std::string, ScopedMemo> memos_ ABSL_GUARDED_BY(mu_);
  std::list<std::string> by_use_ ABSL_GUARDED_BY(mu_);  // least recently used first
  size_t num_bytes_ ABSL_GUARDED_BY(mu_) = 0;           // of all memos
  // Scope and request id of the calls at work.
  absl::flat_hash_set<std::pair<std::string, std::string>> running_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_REQUEST_MEMOS_H_
