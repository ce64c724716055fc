#include "worker/sessions.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "worker/manifest_races.h"

namespace pagetide {
namespace {

// Rows that one step of a compaction moves.
constexpr uint64_t kCompactRows = 4096;
constexpr size_t kMaxCountedSessions = 10000;

std::string SessionNamePrefix(const Tenant& tenant) {
  return absl::StrCat("session/", tenant.name, "/");
}

std::string SessionManifestName(const Tenant& tenant, absl::string_view name) {
  return absl::StrCat(SessionNamePrefix(tenant), name);
}

absl::Status SessionNotFound(absl::string_view name) {
  return WithReason(absl::NotFoundError(absl::StrCat("there is no session ", name)),
                    "SESSION_NOT_FOUND");
}

absl::Status VersionMismatch(absl::string_view name, uint64_t current, uint64_t expected) {
  return WithReason(absl::FailedPreconditionError(absl::StrCat(
                        "session ", name, ": version ", current, " is there, not ", expected)),
                    error_reason::kVersionMismatch, {{"version", absl::StrCat(current)}});
}

SaveAnswer AnswerOf(const SessionState& state, uint64_t version, uint64_t num_pages) {
  return {.version = version,
          .tokens = state.length(),
          .canonical_length = state.canonical_length,
          .pages = num_pages,
          .pages_written = state.pages_written,
          .bytes_written = state.bytes_written,
          .bytes_total = state.bytes_total,
          // A manifest is fsynced together with everything it names, whatever level was asked for.
          .durability = Durability::kLocal};
}

}  // namespace

Sessions::Sessions(Worker* worker, PageStore* store, WorkerFence* fence, Parking* parking)
    : worker_(worker),
      store_(store),
      fence_(fence),
      parking_(parking),
      bytes_written_(worker->metrics().GetCounter("pagetide_session_written_bytes_total",
                                                  "Page bytes that saves sent to the store")),
      bytes_total_(worker->metrics().GetCounter(
          "pagetide_session_saved_bytes_total",
          "Page bytes of the sessions as they were saved, sent or there already")) {}

absl::Status Sessions::CheckStore() const {
  if (store_ != nullptr && fence_ != nullptr) return absl::OkStatus();
  return WithReason(absl::FailedPreconditionError("sessions: this worker has no store"),
                    "NO_STORE");
}

void Sessions::Count(absl::string_view operation, const absl::Status& status) const {
  std::string reason = "OK";
  if (!status.ok()) {
    reason = GetReason(status);
    if (reason.empty()) reason = absl::StatusCodeToString(status.code());
  }
  worker_->metrics()
      .GetCounter("pagetide_session_calls_total",
                  "Saves, loads, deletions and checkpoints by their outcome",
                  {{"operation", std::string(operation)}, {"outcome", reason}})
      ->Increment();
}

absl::StatusOr<ManifestEntry> Sessions::Stat(const std::string& manifest, MonotonicTime deadline) {
  // The exact name is the first that begins with it.
  PT_ASSIGN_OR_RETURN(std::vector<ManifestEntry> found,
                      store_->ListManifests(manifest, "", 1, deadline));
  if (!found.empty() && found.front().name == manifest) return std::move(found.front());
  return ManifestEntry{.name = manifest};
}

absl::StatusOr<StoredSession> Sessions::Read(const Tenant& tenant, absl::string_view name,
                                             std::vector<ManifestPageRef>* pages,
                                             MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckStore());
  PT_RETURN_IF_ERROR(ValidateName("name", name));
  const std::string manifest_name = SessionManifestName(tenant, name);
  absl::StatusOr<ManifestRecord> manifest = store_->GetManifest(manifest_name, deadline);
  if (absl::IsNotFound(manifest.status())) return SessionNotFound(name);
  PT_RETURN_IF_ERROR(manifest.status());
  PT_ASSIGN_OR_RETURN(SessionState state,
                      ParseSessionState(manifest->payload, manifest->pages.size()));
  if (manifest->name != manifest_name || state.tenant != tenant.name) {
    return absl::DataLossError(
        absl::StrCat("read session ", name, ": the store answered another manifest"));
  }
  StoredSession session{.name = std::string(name),
                        .version = manifest->version,
                        .num_pages = manifest->pages.size(),
                        .saved_at = manifest->saved_at,
                        .state = std::move(state)};
  if (pages != nullptr) *pages = std::move(manifest->pages);
  return session;
}

absl::StatusOr<std::optional<SaveAnswer>> Sessions::FindAnswer(const Tenant& tenant,
                                                               const SaveRequest& request,
                                                               MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckStore());
  PT_RETURN_IF_ERROR(ValidateName("name", request.name));
  if (request.request_id.empty()) return std::nullopt;
  PT_ASSIGN_OR_RETURN(const ManifestEntry current,
                      Stat(SessionManifestName(tenant, request.name), deadline));
  if (current.version == 0 || current.request_id != request.request_id) return std::nullopt;
  absl::StatusOr<StoredSession> session = Read(tenant, request.name, nullptr, deadline);
  if (absl::IsNotFound(session.status())) return std::nullopt;
  PT_RETURN_IF_ERROR(session.status());
  if (session->version != current.version) return std::nullopt;
  if (session->state.request_digest != request.request_digest) {
    return WithReason(absl::InvalidArgumentError(absl::StrCat("save session ", request.name,
                                                              ": request_id ", request.request_id,
                                                              " was used for another request")),
                      "REQUEST_ID_REUSED");
  }
  return AnswerOf(session->state, session->version, session->num_pages);
}

absl::StatusOr<PutManifestResult> Sessions::PutState(StateSnapshot& snapshot,
                                                     const SaveRequest& request,
                                                     ManifestRecord manifest,
                                                     uint64_t expected_version,
                                                     const WriteFence& fence, SaveAnswer* answer,
                                                     MonotonicTime deadline) {
  std::vector<PageKey> missing;
  for (int attempt = 0; attempt <= kMaxPutAgain; ++attempt) {
    // One barrier for all: the store makes the manifest durable together with every page it names.
    PT_ASSIGN_OR_RETURN(StateSnapshot::Put put,
                        snapshot.PutPages(missing, Durability::kProcess, deadline));
    SessionState state = snapshot.state();
    state.metadata = request.metadata;
    state.request_digest = request.request_digest;
    state.pages_written = put.pages_written;
    state.bytes_written = put.bytes_written;
    manifest.pages = std::move(put.pages);
    manifest.payload = EncodeSessionState(state);
    manifest.summary = EncodeSessionSummary(SummaryOf(state));
    PT_ASSIGN_OR_RETURN(PutManifestResult result,
                        store_->PutManifest(manifest, expected_version, fence, deadline));
    if (result.committed) {
      *answer = AnswerOf(state, result.version, manifest.pages.size());
      return result;
    }
    missing = std::move(result.missing);
  }
  return absl::AbortedError(absl::StrCat("save session ", request.name, ": ", missing.size(),
                                         " pages left the store again before they could be named"));
}

absl::StatusOr<SequenceHandle> Sessions::Compacted(const Tenant& tenant, ModelHost* host,
                                                   SequenceHandle sequence,
                                                   MonotonicTime deadline) {
  for (;;) {
    PT_ASSIGN_OR_RETURN(const CompactResult result,
                        host->Compact(tenant, sequence, kCompactRows, false, deadline));
    if (result.moved_rows == 0) return sequence;
    if (sequence.expected_revision) sequence.expected_revision = result.info.revision;
  }
}

absl::StatusOr<SaveAnswer> Sessions::Save(const Tenant& tenant, ModelHost* host,
                                          const SaveRequest& request, MonotonicTime deadline) {
  WriteFence fence;
  const auto save = [&]() -> absl::StatusOr<SaveAnswer> {
    PT_RETURN_IF_ERROR(CheckStore());
    PT_RETURN_IF_ERROR(ValidateName("name", request.name));
    PT_RETURN_IF_ERROR(ValidateSessionMetadata(request.metadata));
    if (request.level == Durability::kCache) {
      return absl::InvalidArgumentError("level is CACHE, a save must be PROCESS or LOCAL");
    }
    // First of all: what is written below belongs to this ownership period.
    PT_ASSIGN_OR_RETURN(fence, parking_ == nullptr ? fence_->Get(deadline)
                                                   : parking_->FenceOf(request.sequence, deadline));
    SequenceHandle sequence = request.sequence;
    if (request.compact) {
      PT_ASSIGN_OR_RETURN(sequence, Compacted(tenant, host, sequence, deadline));
    }
    PT_ASSIGN_OR_RETURN(const std::unique_ptr<StateSnapshot> snapshot,
                        host->Snapshot(tenant, sequence, request.keep_tokens));
    SessionState whole = snapshot->state();
    whole.metadata = request.metadata;
    PT_RETURN_IF_ERROR(CheckManifestSize(absl::StrCat("save session ", request.name), whole));
    ManifestRecord manifest;
    manifest.name = SessionManifestName(tenant, request.name);
    manifest.request_id = request.request_id;
    for (int race = 0; race < kMaxRaces; ++race) {
      PT_ASSIGN_OR_RETURN(const ManifestEntry current, Stat(manifest.name, deadline));
      if (request.expected_version && *request.expected_version != current.version) {
        return VersionMismatch(request.name, current.version, *request.expected_version);
      }
      manifest.saved_at = worker_->clock().WallNow();
      SaveAnswer answer;
      const absl::StatusOr<PutManifestResult> put =
          PutState(*snapshot, request, manifest, current.version, fence, &answer, deadline);
      if (put.ok()) return answer;
      if (GetReason(put.status()) != error_reason::kVersionMismatch || request.expected_version) {
        return put.status();
      }
    }
    return absl::AbortedError(absl::StrCat("save session ", request.name, ": lost the race for it ",
                                           kMaxRaces, " times"));
  };
  absl::StatusOr<SaveAnswer> answer = save();
  Count("save", answer.status());
  if (parking_ != nullptr && GetReason(answer.status()) == error_reason::kStaleEpoch) {
    parking_->NoteStale(fence);
  }
  if (answer.ok()) {
    bytes_written_->Add(static_cast<double>(answer->bytes_written));
    bytes_total_->Add(static_cast<double>(answer->bytes_total));
  }
  return answer;
}

absl::StatusOr<LoadedSession> Sessions::Load(const Tenant& tenant, absl::string_view name,
                                             std::optional<uint64_t> version,
                                             absl::string_view model_digest,
                                             std::optional<uint64_t> length,
                                             MonotonicTime deadline) {
  const auto load = [&]() -> absl::StatusOr<LoadedSession> {
    std::vector<ManifestPageRef> pages;
    LoadedSession loaded;
    PT_ASSIGN_OR_RETURN(loaded.session, Read(tenant, name, &pages, deadline));
    if (version && *version != loaded.session.version) {
      return VersionMismatch(name, loaded.session.version, *version);
    }
    PT_RETURN_IF_ERROR(worker_->CheckModel(loaded.session.state, model_digest, deadline));
    PT_ASSIGN_OR_RETURN(loaded.host,
                        worker_->HostOfModel(loaded.session.state.model_digest.ToHex(), deadline));
    PT_ASSIGN_OR_RETURN(loaded.open, loaded.host->OpenSaved(tenant, loaded.session.state, pages,
                                                            length, std::nullopt));
    return loaded;
  };
  absl::StatusOr<LoadedSession> loaded = load();
  Count("load", loaded.status());
  if (loaded.ok()) {
    MutexLock lock(&mu_);
    if (loads_.size() >= kMaxCountedSessions) loads_.clear();
    ++loads_[SessionManifestName(tenant, name)];
  }
  return loaded;
}

absl::StatusOr<StoredSession> Sessions::Peek(const Tenant& tenant, absl::string_view name,
                                             MonotonicTime deadline) {
  return Read(tenant, name, nullptr, deadline);
}

absl::StatusOr<std::vector<ListedSession>> Sessions::List(const Tenant& tenant,
                                                          absl::string_view prefix,
                                                          absl::string_view after, size_t limit,
                                                          MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckStore());
  const std::string root = SessionNamePrefix(tenant);
  PT_ASSIGN_OR_RETURN(
      const std::vector<ManifestEntry> found,
      store_->ListManifests(absl::StrCat(root, prefix),
                            after.empty() ? "" : absl::StrCat(root, after), limit, deadline));
  std::vector<ListedSession> sessions;
  for (const ManifestEntry& entry : found) {
    PT_ASSIGN_OR_RETURN(const SessionSummary summary, ParseSessionSummary(entry.summary));
    sessions.push_back({.name = entry.name.substr(root.size()),
                        .version = entry.version,
                        .num_pages = entry.num_pages,
                        .saved_at = entry.saved_at,
                        .summary = summary});
  }
  return sessions;
}

absl::StatusOr<uint64_t> Sessions::Delete(const Tenant& tenant, absl::string_view name,
                                          std::optional<uint64_t> expected_version,
                                          MonotonicTime deadline) {
  const auto remove = [&]() -> absl::StatusOr<uint64_t> {
    PT_RETURN_IF_ERROR(CheckStore());
    PT_RETURN_IF_ERROR(ValidateName("name", name));
    PT_ASSIGN_OR_RETURN(const WriteFence fence, fence_->Get(deadline));
    const std::string manifest = SessionManifestName(tenant, name);
    for (int race = 0; race < kMaxRaces; ++race) {
      PT_ASSIGN_OR_RETURN(const ManifestEntry current, Stat(manifest, deadline));
      if (current.version == 0) return SessionNotFound(name);
      if (expected_version && *expected_version != current.version) {
        return VersionMismatch(name, current.version, *expected_version);
      }
      const absl::Status deleted =
          store_->DeleteManifest(manifest, current.version, fence, deadline);
      if (deleted.ok()) return current.version;
      if (absl::IsNotFound(deleted)) return SessionNotFound(name);
      if (GetReason(deleted) != error_reason::kVersionMismatch) return deleted;
    }
    return absl::AbortedError(
        absl::StrCat("delete session ", name, ": it was saved again ", kMaxRaces, " times"));
  };
  absl::StatusOr<uint64_t> deleted = remove();
  Count("delete", deleted.status());
  return deleted;
}

uint64_t Sessions::LoadsHere(const Tenant& tenant, absl::string_view name) const {
  MutexLock lock(&mu_);
  const auto it = loads_.find(SessionManifestName(tenant, name));
  return it == loads_.end() ? 0 : it->second;
}

absl::StatusOr<CheckpointInfo> Sessions::CreateCheckpoint(const Tenant& tenant, ModelHost* host,
                                                          const SequenceHandle& sequence,
                                                          CheckpointOptions options,
                                                          MonotonicTime deadline) {
  const auto create = [&]() -> absl::StatusOr<CheckpointInfo> {
    if (options.tier == Tier::kStore) {
      PT_RETURN_IF_ERROR(CheckStore());
      PT_ASSIGN_OR_RETURN(options.fence, parking_ == nullptr
                                             ? fence_->Get(deadline)
                                             : parking_->FenceOf(sequence, deadline));
    }
    return host->CreateCheckpoint(tenant, sequence, options, deadline);
  };
  absl::StatusOr<CheckpointInfo> info = create();
  Count("checkpoint", info.status());
  if (parking_ != nullptr && options.fence &&
      GetReason(info.status()) == error_reason::kStaleEpoch) {
    parking_->NoteStale(*options.fence);
  }
  return info;
}

absl::StatusOr<SequenceInfo> Sessions::RestoreCheckpoint(const Tenant& tenant, ModelHost* host,
                                                         const SequenceHandle& sequence,
                                                         uint64_t checkpoint_id,
                                                         MonotonicTime deadline) {
  absl::StatusOr<SequenceInfo> info =
      host->RestoreCheckpoint(tenant, sequence, checkpoint_id, deadline);
  Count("restore", info.status());
  return info;
}

}  // namespace pagetide
