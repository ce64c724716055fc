#include "worker/parking.h"

#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/error_info.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "worker/manifest_races.h"

namespace pagetide {
namespace {

constexpr absl::Duration kMaxTtl = absl::Hours(24 * 366);
constexpr char kParkedValue[] = "parked";
constexpr char kFenceKeyPrefix[] = "sequence/";

std::string ManifestName(const Tenant& tenant, SequenceId id) {
  return absl::StrCat("parked/", tenant.name, "/", id.ToString());
}

std::string RecordKey(SequenceId id) {
  return absl::StrCat(kFenceKeyPrefix, id.ToString());
}

absl::Status NotParked(SequenceId id) {
  return WithReason(absl::NotFoundError(absl::StrCat("sequence ", id.ToString(),
                                                     " is neither open here nor parked")),
                    "SEQUENCE_NOT_FOUND");
}

absl::Status TakenOver(SequenceId id, uint64_t epoch, uint64_t current) {
  return WithReason(
      absl::FailedPreconditionError(absl::StrCat("sequence ", id.ToString(), ": epoch ", epoch,
                                                 " was taken over, ", current, " is there now")),
      error_reason::kStaleEpoch, {{"epoch", absl::StrCat(current)}});
}

// Who owns a sequence: "worker/<id> <incarnation, 16 hex digits>".
struct Owner {
  std::string lease;  // "worker/<id>"
  uint64_t incarnation = 0;
};
std::optional<Owner> ParseOwner(absl::string_view value) {
  const std::pair<absl::string_view, absl::string_view> parts =
      absl::StrSplit(value, absl::MaxSplits(' ', 1));
  Owner owner{.lease = std::string(parts.first)};
  if (!absl::SimpleHexAtoi(parts.second, &owner.incarnation)) return std::nullopt;
  return owner;
}

}  // namespace

Parking::Parking(Options options, Worker* worker, PageStore* store, WorkerFence* fence)
    : options_(options), worker_(worker), store_(store), fence_(fence) {}

absl::Status Parking::CheckStore() const {
  if (store_ != nullptr && fence_ != nullptr) return absl::OkStatus();
  return WithReason(absl::FailedPreconditionError("parking: this worker has no store"), "NO_STORE");
}

std::string Parking::MyOwnerValue() const {
  return absl::StrCat("worker/", worker_->id(), " ",
                      absl::Hex(worker_->incarnation(), absl::kZeroPad16));
}

void Parking::Count(absl::string_view operation, const absl::Status& status) const {
  std::string reason = "OK";
  if (!status.ok()) {
    reason = GetReason(status);
    if (reason.empty()) reason = absl::StatusCodeToString(status.code());
  }
  worker_->metrics()
      .GetCounter("pagetide_parking_calls_total", "Parks, resumes and takeovers by their outcome",
                  {{"operation", std::string(operation)}, {"outcome", reason}})
      ->Increment();
}

absl::StatusOr<std::optional<ManifestEntry>> Parking::Stat(const Tenant& tenant, SequenceId id,
                                                           MonotonicTime deadline) {
  // The exact name is the first that begins with it.
  const std::string name = ManifestName(tenant, id);
  PT_ASSIGN_OR_RETURN(std::vector<ManifestEntry> found,
                      store_->ListManifests(name, "", 1, deadline));
  if (found.empty() || found.front().name != name) return std::optional<ManifestEntry>();
  return std::optional<ManifestEntry>(std::move(found.front()));
}

absl::StatusOr<Parking::Parked> Parking::Read(const Tenant& tenant, SequenceId id,
                                              MonotonicTime deadline) {
  Parked parked;
  const std::string name = ManifestName(tenant, id);
  absl::StatusOr<ManifestRecord> manifest = store_->GetManifest(name, deadline);
  if (absl::IsNotFound(manifest.status())) return NotParked(id);
  PT_RETURN_IF_ERROR(manifest.status());
  PT_ASSIGN_OR_RETURN(parked.state, ParseSessionState(manifest->payload, manifest->pages.size()));
  if (manifest->name != name || parked.state.tenant != tenant.name) {
    return absl::DataLossError(
        absl::StrCat("resume sequence ", id.ToString(), ": the store answered another manifest"));
  }
  parked.manifest = *std::move(manifest);
  return parked;
}

// ---- fences ------------------------------------------------------------------------------------

absl::StatusOr<WriteFence> Parking::FenceOf(const SequenceHandle& sequence,
                                            MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckStore());
  // Whoever has no lease writes nothing durable, whatever the sequence's own record says.
  PT_ASSIGN_OR_RETURN(const WriteFence worker, fence_->Get(deadline));
  MutexLock lock(&mu_);
  const auto it = owned_.find(sequence.id);
  if (it == owned_.end()) return worker;
  // Refused before it carries the fence of the one who may write: what the store refuses as stale
  // closes the copy that is open here.
  if (it->second.epoch != sequence.epoch) {
    return TakenOver(sequence.id, sequence.epoch, it->second.epoch);
  }
  return WriteFence{RecordKey(sequence.id), it->second.epoch};
}

bool Parking::Owns(SequenceId id) const {
  MutexLock lock(&mu_);
  return owned_.contains(id);
}

absl::Status Parking::CheckMayMove(SequenceId id) const {
  MutexLock lock(&mu_);
  const absl::string_view how = "move it with ParkSequence here and ResumeSequence there";
  if (owned_.contains(id)) {
    return WithReason(absl::FailedPreconditionError(absl::StrCat(
                          "send sequence ", id.ToString(), ": the store names its owner; ", how)),
                      "SEQUENCE_IS_PARKED");
  }
  if (parking_.contains(id)) {
    return WithRetryDelay(
        WithReason(absl::AbortedError(absl::StrCat("send sequence ", id.ToString(),
                                                   ": it is being parked; ", how)),
                   "SEQUENCE_IS_PARKED"),
        absl::Milliseconds(100));
  }
  return absl::OkStatus();
}

void Parking::Forget(SequenceId id, uint64_t epoch) {
  MutexLock lock(&mu_);
  const auto it = owned_.find(id);
  if (it != owned_.end() && it->second.epoch == epoch) owned_.erase(it);
}

void Parking::CloseHere(SequenceId id, uint64_t epoch) {
  Owned owned;
  {
    MutexLock lock(&mu_);
    const auto it = owned_.find(id);
    if (it == owned_.end() || it->second.epoch != epoch) return;
    owned = std::move(it->second);
    owned_.erase(it);
  }
  const absl::StatusOr<ModelHost*> host = worker_->HostOfSequence(id);
  if (!host.ok()) return;
  const Tenant tenant = worker_->TenantNamed(owned.tenant);
  (*host)->Close(tenant, id, owned.epoch).IgnoreError();
  worker_->NoteClosed(**host, tenant, id);
  LogInfo("worker", "sequence ", id.ToString(), ", epoch ", owned.epoch,
          ", was taken over by another worker: its copy here is closed");
}

void Parking::NoteStale(const WriteFence& fence) {
  absl::string_view text = fence.ownership_key;
  if (!absl::ConsumePrefix(&text, kFenceKeyPrefix)) return;
  const absl::StatusOr<SequenceId> id = SequenceId::Parse(text);
  if (id.ok()) CloseHere(*id, fence.epoch);
}

void Parking::NoteIdle(SequenceId id, uint64_t epoch) {
  MutexLock lock(&mu_);
  const auto it = owned_.find(id);
  // It may have been resumed here since.
  if (it != owned_.end() && it->second.epoch == epoch) it->second.is_idle = true;
}

void Parking::GiveUpIdle(MonotonicTime deadline) {
  std::vector<std::pair<SequenceId, uint64_t>> idle;
  {
    MutexLock lock(&mu_);
    for (const auto& [id, entry] : owned_) {
      if (entry.is_idle) idle.emplace_back(id, entry.epoch);
    }
  }
  for (const auto& [id, epoch] : idle) {
    const absl::Status given =
        store_->CompareAndSetRecord(kOwnerRecordKind, RecordKey(id), epoch, kParkedValue, deadline)
            .status();
    Count("give_up", given);
    if (absl::IsUnavailable(given) || absl::IsDeadlineExceeded(given)) return;
    // A mismatch: not ours any more, but taken over, resumed or closed meanwhile. A record that
    // cannot be written does not hold up the others.
    if (given.ok() || GetReason(given) == error_reason::kVersionMismatch) Forget(id, epoch);
  }
}

void Parking::CheckOwned(MonotonicTime deadline) {
  std::vector<std::pair<SequenceId, uint64_t>> owned;
  {
    MutexLock lock(&mu_);
    for (const auto& [id, entry] : owned_) owned.emplace_back(id, entry.epoch);
  }
  for (const auto& [id, epoch] : owned) {
    const absl::StatusOr<StoreRecord> record =
        store_->GetRecord(kOwnerRecordKind, RecordKey(id), deadline);
    if (!record.ok() && !absl::IsNotFound(record.status())) return;  // the fence still holds
    if (!record.ok() || record->version != epoch) CloseHere(id, epoch);
  }
}

// ---- park --------------------------------------------------------------------------------------

absl::Status Parking::Own(const Tenant& tenant, const SequenceHandle& sequence,
                          MonotonicTime deadline) {
  {
    MutexLock lock(&mu_);
    if (owned_.contains(sequence.id)) return absl::OkStatus();
  }
  const std::string key = RecordKey(sequence.id);
  // The record's version is the epoch, and grows by one with each write: a sequence that was moved
  // here, whose epochs no record knows, gets the earlier ones first. Until the last of them nothing
  // durable is fenced by the record, and there is nothing to resume.
  uint64_t version = sequence.epoch - 1;
  while (version != sequence.epoch) {
    if (worker_->clock().MonotonicNow() >= deadline) {
      return absl::DeadlineExceededError(absl::StrCat("park sequence ", sequence.id.ToString(),
                                                      ": its ownership record is at ", version,
                                                      " of epoch ", sequence.epoch));
    }
    const absl::StatusOr<uint64_t> made =
        store_->CompareAndSetRecord(kOwnerRecordKind, key, version, MyOwnerValue(), deadline);
    if (made.ok()) {
      version = *made;
      continue;
    }
    if (GetReason(made.status()) != error_reason::kVersionMismatch) return made.status();
    // None yet; or made, in part, by an attempt whose answer was lost, by another park of this
    // sequence, or by a worker that had it before it was moved.
    const absl::StatusOr<StoreRecord> record = store_->GetRecord(kOwnerRecordKind, key, deadline);
    if (!record.ok() && !absl::IsNotFound(record.status())) return record.status();
    version = record.ok() ? record->version : 0;
    if (version > sequence.epoch ||
        (version == sequence.epoch && record->value != MyOwnerValue())) {
      return TakenOver(sequence.id, sequence.epoch, version);
    }
  }
  MutexLock lock(&mu_);
  owned_.try_emplace(sequence.id, Owned{tenant.name, sequence.epoch});
  return absl::OkStatus();
}

absl::StatusOr<std::optional<ParkAnswer>> Parking::PutParked(StateSnapshot& snapshot,
                                                             const Tenant& tenant,
                                                             const ParkRequest& request,
                                                             uint64_t expected_version,
                                                             MonotonicTime deadline) {
  const SequenceId id = request.sequence.id;
  const WriteFence fence{RecordKey(id), request.sequence.epoch};
  ManifestRecord manifest;
  manifest.name = ManifestName(tenant, id);
  manifest.request_id = request.request_id;
  std::vector<PageKey> missing;
  for (int attempt = 0; attempt <= kMaxPutAgain; ++attempt) {
    PT_ASSIGN_OR_RETURN(StateSnapshot::Put put,
                        snapshot.PutPages(missing, Durability::kProcess, deadline));
    SessionState state = snapshot.state();
    state.request_digest = request.request_digest;
    state.pages_written = put.pages_written;
    state.bytes_written = put.bytes_written;
    manifest.pages = std::move(put.pages);
    manifest.payload = EncodeSessionState(state);
    manifest.summary = EncodeSessionSummary(SummaryOf(state));
    manifest.saved_at = worker_->clock().WallNow();
    if (request.ttl) manifest.expires_at = manifest.saved_at + *request.ttl;
    absl::StatusOr<PutManifestResult> result =
        store_->PutManifest(manifest, expected_version, fence, deadline);
    if (GetReason(result.status()) == error_reason::kVersionMismatch) return std::nullopt;
    PT_RETURN_IF_ERROR(result.status());
    if (result->committed) {
      return ParkAnswer{.version = result->version,
                        .epoch = request.sequence.epoch,
                        .is_open = true,
                        .tokens = state.length(),
                        .pages = manifest.pages.size(),
                        .pages_written = state.pages_written,
                        .bytes_written = state.bytes_written,
                        .bytes_total = state.bytes_total};
    }
    missing = std::move(result->missing);
  }
  return absl::AbortedError(absl::StrCat("park sequence ", id.ToString(),
                                         ": its pages kept vanishing from the store, last ",
                                         missing.size(), " of them"));
}

absl::Status Parking::GiveUp(const Tenant& tenant, ModelHost* host, const SequenceHandle& sequence,
                             ParkAnswer* answer, MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(host->CloseUnchanged(tenant, sequence));
  worker_->NoteClosed(*host, tenant, sequence.id);
  answer->is_open = false;
  const absl::StatusOr<uint64_t> given = store_->CompareAndSetRecord(
      kOwnerRecordKind, RecordKey(sequence.id), sequence.epoch, kParkedValue, deadline);
  // Not what a resume made of it since.
  Forget(sequence.id, sequence.epoch);
  if (given.ok()) {
    answer->epoch = *given;
  } else {
    // Saved it is; until this worker's lease ends only it can resume the sequence.
    LogWarning("worker", "park sequence ", sequence.id.ToString(),
               ": the store still names this worker its owner: ", given.status().message());
  }
  return absl::OkStatus();
}

absl::StatusOr<ParkAnswer> Parking::Park(const Tenant& tenant, ModelHost* host,
                                         const ParkRequest& request, MonotonicTime deadline) {
  const auto park = [&]() -> absl::StatusOr<ParkAnswer> {
    PT_RETURN_IF_ERROR(CheckStore());
    if (request.ttl && (*request.ttl <= absl::ZeroDuration() || *request.ttl > kMaxTtl)) {
      return absl::InvalidArgumentError(absl::StrCat("ttl is ", absl::FormatDuration(*request.ttl),
                                                     ", must be above 0 and at most ",
                                                     absl::FormatDuration(kMaxTtl)));
    }
    PT_RETURN_IF_ERROR(fence_->Get(deadline).status());
    const SequenceId id = request.sequence.id;
    for (int race = 0; race < kMaxRaces; ++race) {
      // The version first, then the state: whatever another park put before is older than what is
      // taken here, and what it puts meanwhile is not overwritten.
      PT_ASSIGN_OR_RETURN(const std::optional<ManifestEntry> current, Stat(tenant, id, deadline));
      PT_ASSIGN_OR_RETURN(const SequenceInfo info, host->Get(tenant, id));
      // What is parked and closed is this revision and no other.
      SequenceHandle sequence = request.sequence;
      if (!sequence.expected_revision) sequence.expected_revision = info.revision;
      if (!request.keep_open && info.pending_tokens > 0) {
        return WithReason(absl::FailedPreconditionError(
                              absl::StrCat("park sequence ", id.ToString(), ": a write of ",
                                           info.pending_tokens, " tokens is pending")),
                          error_reason::kPendingWrite);
      }
      PT_ASSIGN_OR_RETURN(const std::unique_ptr<StateSnapshot> snapshot,
                          host->Snapshot(tenant, sequence, std::nullopt));
      PT_RETURN_IF_ERROR(
          CheckManifestSize(absl::StrCat("park sequence ", id.ToString()), snapshot->state()));
      PT_RETURN_IF_ERROR(Own(tenant, sequence, deadline));
      PT_ASSIGN_OR_RETURN(
          std::optional<ParkAnswer> answer,
          PutParked(*snapshot, tenant, request, current ? current->version : 0, deadline));
      if (!answer) continue;
      if (!request.keep_open) {
        PT_RETURN_IF_ERROR(GiveUp(tenant, host, sequence, &*answer, deadline));
      }
      return *std::move(answer);
    }
    return absl::AbortedError(absl::StrCat("park sequence ", id.ToString(), ": ", kMaxRaces,
                                           " other parks of it came in between"));
  };
  // Before its snapshot: a move that begins behind that sees it.
  {
    MutexLock lock(&mu_);
    ++parking_[request.sequence.id];
  }
  absl::StatusOr<ParkAnswer> answer = park();
  {
    MutexLock lock(&mu_);
    const auto it = parking_.find(request.sequence.id);
    if (--it->second == 0) parking_.erase(it);
  }
  Count("park", answer.status());
  if (GetReason(answer.status()) == error_reason::kStaleEpoch) {
    NoteStale({RecordKey(request.sequence.id), request.sequence.epoch});
  }
  return answer;
}

absl::StatusOr<std::optional<ParkAnswer>> Parking::FindAnswer(const Tenant& tenant, SequenceId id,
                                                              const ParkRequest& request,
                                                              MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckStore());
  if (request.request_id.empty()) return std::nullopt;
  PT_ASSIGN_OR_RETURN(const std::optional<ManifestEntry> current, Stat(tenant, id, deadline));
  if (!current || current->request_id != request.request_id) return std::nullopt;
  absl::StatusOr<Parked> parked = Read(tenant, id, deadline);
  if (absl::IsNotFound(parked.status())) return std::nullopt;
  PT_RETURN_IF_ERROR(parked.status());
  const SessionState& state = parked->state;
  if (parked->manifest.version != current->version) return std::nullopt;
  if (state.request_digest != request.request_digest) {
    return WithReason(absl::InvalidArgumentError(absl::StrCat("park sequence ", id.ToString(),
                                                              ": request_id ", request.request_id,
                                                              " was used for another request")),
                      "REQUEST_ID_REUSED");
  }
  // Parked and still open although it was to be closed: then the first attempt ended halfway, and
  // the work is done again.
  const bool is_open_here = worker_->HostOfSequence(id).ok();
  if (is_open_here && !request.keep_open) return std::nullopt;
  PT_ASSIGN_OR_RETURN(const StoreRecord record,
                      store_->GetRecord(kOwnerRecordKind, RecordKey(id), deadline));
  return ParkAnswer{.version = parked->manifest.version,
                    .epoch = record.version,
                    .is_open = record.value != kParkedValue,
                    .tokens = state.length(),
                    .pages = parked->manifest.pages.size(),
                    .pages_written = state.pages_written,
                    .bytes_written = state.bytes_written,
                    .bytes_total = state.bytes_total};
}

// ---- resume ------------------------------------------------------------------------------------

absl::StatusOr<uint64_t> Parking::Advance(SequenceId id, const StoreRecord& record,
                                          MonotonicTime deadline) {
  const absl::StatusOr<uint64_t> epoch = store_->CompareAndSetRecord(
      kOwnerRecordKind, RecordKey(id), record.version, MyOwnerValue(), deadline);
  if (GetReason(epoch.status()) == error_reason::kVersionMismatch) {
    // Ours, if the answer to the first of two tries was lost.
    const absl::StatusOr<StoreRecord> now =
        store_->GetRecord(kOwnerRecordKind, RecordKey(id), deadline);
    if (now.ok() && now->version == record.version + 1 && now->value == MyOwnerValue()) {
      return now->version;
    }
    return absl::AbortedError(absl::StrCat("resume sequence ", id.ToString(), ": epoch ",
                                           record.version, " was taken by another"));
  }
  return epoch;
}

absl::StatusOr<uint64_t> Parking::FenceOff(const StoreLease& lease, MonotonicTime deadline) {
  const absl::StatusOr<StoreRecord> record =
      store_->GetRecord(kOwnerRecordKind, lease.name, deadline);
  if (absl::IsNotFound(record.status())) return 0;  // it never wrote anything durable
  PT_RETURN_IF_ERROR(record.status());
  if (LeaseEpochOf(record->value) > lease.epoch) {
    return absl::AbortedError(
        absl::StrCat("resume: ", lease.name, " came back while its sequence was taken over"));
  }
  absl::StatusOr<uint64_t> advanced = store_->CompareAndSetRecord(
      kOwnerRecordKind, lease.name, record->version,
      FenceValue(absl::StrCat("taken over by ", MyOwnerValue()), lease.epoch), deadline);
  // Another was faster: the epoch that the dead worker had is gone all the same.
  if (GetReason(advanced.status()) == error_reason::kVersionMismatch) return record->version + 1;
  return advanced;
}

absl::StatusOr<uint64_t> Parking::TakeOver(SequenceId id, const StoreRecord& record,
                                           bool* was_taken_over, MonotonicTime deadline) {
  *was_taken_over = false;
  if (record.value == kParkedValue) return Advance(id, record, deadline);
  const std::optional<Owner> owner = ParseOwner(record.value);
  if (!owner) {
    return absl::DataLossError(absl::StrCat("resume sequence ", id.ToString(),
                                            ": its ownership record has ", record.value.size(),
                                            " bytes that name no worker"));
  }
  const std::string my_lease = absl::StrCat("worker/", worker_->id());
  *was_taken_over = owner->incarnation != worker_->incarnation();
  // We hold the lease of our name, so no earlier life of ours does.
  if (owner->lease == my_lease) return Advance(id, record, deadline);
  // The owner is dead when its lease can be had; as long as we hold it, it cannot come back.
  const absl::StatusOr<StoreLease> lease =
      store_->AcquireLease(owner->lease, worker_->incarnation(), options_.lease_ttl, deadline);
  if (absl::IsAlreadyExists(lease.status())) {
    const absl::string_view worker = absl::StripPrefix(owner->lease, "worker/");
    return WithRetryDelay(
        WithReason(absl::FailedPreconditionError(absl::StrCat(
                       "resume sequence ", id.ToString(), ": worker ", worker,
                       " has it and is alive: park it there first, or ask that worker")),
                   error_reason::kSequenceMoved, {{"worker_id", std::string(worker)}}),
        options_.lease_ttl);
  }
  PT_RETURN_IF_ERROR(lease.status());
  absl::StatusOr<uint64_t> epoch = FenceOff(*lease, deadline);
  if (epoch.ok()) epoch = Advance(id, record, deadline);
  // If it cannot be given back it ends by itself.
  store_->ReleaseLease(*lease, deadline).IgnoreError();
  return epoch;
}

void Parking::GiveBack(const Tenant& tenant, SequenceId id, uint64_t epoch,
                       MonotonicTime deadline) {
  const absl::Status given =
      store_->CompareAndSetRecord(kOwnerRecordKind, RecordKey(id), epoch, kParkedValue, deadline)
          .status();
  Count("give_up", given);
  if (given.ok() || GetReason(given) == error_reason::kVersionMismatch) return;
  MutexLock lock(&mu_);
  owned_.insert_or_assign(id, Owned{tenant.name, epoch, /*is_idle=*/true});
}

absl::StatusOr<ResumedSequence> Parking::ResumeAlone(const Tenant& tenant, SequenceId id,
                                                     absl::string_view model_digest,
                                                     MonotonicTime deadline, bool* was_taken_over) {
  PT_RETURN_IF_ERROR(CheckStore());
  PT_RETURN_IF_ERROR(fence_->Get(deadline).status());
  PT_ASSIGN_OR_RETURN(Parked parked, Read(tenant, id, deadline));
  PT_RETURN_IF_ERROR(worker_->CheckModel(parked.state, model_digest, deadline));
  const absl::StatusOr<StoreRecord> record =
      store_->GetRecord(kOwnerRecordKind, RecordKey(id), deadline);
  if (absl::IsNotFound(record.status())) return NotParked(id);
  PT_RETURN_IF_ERROR(record.status());
  if (record->value == MyOwnerValue()) {
    if (const auto host = worker_->HostOfSequence(id); host.ok()) {
      PT_ASSIGN_OR_RETURN(const SequenceInfo info, (*host)->Get(tenant, id));
      return ResumedSequence{
          .host = *host, .info = info, .parked_version = parked.manifest.version};
    }
  }
  PT_ASSIGN_OR_RETURN(ModelHost * host,
                      worker_->HostOfModel(parked.state.model_digest.ToHex(), deadline));
  PT_ASSIGN_OR_RETURN(const uint64_t epoch, TakeOver(id, *record, was_taken_over, deadline));
  // What the owner before parked last, which may be more than what was read before.
  const absl::StatusOr<Parked> last = Read(tenant, id, deadline);
  const absl::StatusOr<OpenResult> open =
      last.ok() ? host->OpenSaved(tenant, last->state, last->manifest.pages, std::nullopt,
                                  SequenceIdentity{id, epoch})
                : last.status();
  if (!open.ok()) {
    GiveBack(tenant, id, epoch, deadline);
    return open.status();
  }
  {
    MutexLock lock(&mu_);
    owned_.insert_or_assign(id, Owned{tenant.name, epoch});
  }
  return ResumedSequence{.host = host,
                         .info = open->info,
                         .restoring_pages = open->restoring_pages,
                         .parked_version = last->manifest.version,
                         .was_taken_over = *was_taken_over};
}

absl::StatusOr<ResumedSequence> Parking::Resume(const Tenant& tenant, SequenceId id,
                                                absl::string_view model_digest,
                                                MonotonicTime deadline) {
  {
    MutexLock lock(&mu_);
    while (resuming_.contains(id)) {
      const absl::Duration left = deadline - worker_->clock().MonotonicNow();
      if (left <= absl::ZeroDuration()) {
        return absl::DeadlineExceededError(
            absl::StrCat("resume sequence ", id.ToString(), ": another resume of it still runs"));
      }
      resumed_.WaitWithTimeout(&mu_, left);
    }
    resuming_.insert(id);
  }
  bool was_taken_over = false;
  absl::StatusOr<ResumedSequence> resumed =
      ResumeAlone(tenant, id, model_digest, deadline, &was_taken_over);
  {
    MutexLock lock(&mu_);
    resuming_.erase(id);
  }
  resumed_.SignalAll();
  Count(was_taken_over ? "takeover" : "resume", resumed.status());
  return resumed;
}

absl::StatusOr<bool> Parking::Drop(const Tenant& tenant, SequenceId id, uint64_t epoch,
                                   MonotonicTime deadline) {
  if (store_ == nullptr) return false;
  PT_ASSIGN_OR_RETURN(const std::optional<ManifestEntry> current, Stat(tenant, id, deadline));
  const absl::StatusOr<StoreRecord> record =
      store_->GetRecord(kOwnerRecordKind, RecordKey(id), deadline);
  if (!record.ok() && !absl::IsNotFound(record.status())) return record.status();
  bool is_tenants = current.has_value();  // the manifest's name says whose it is
  {
    MutexLock lock(&mu_);
    const auto it = owned_.find(id);
    if (it != owned_.end()) is_tenants = it->second.tenant == tenant.name;
  }
  const bool may_drop = is_tenants && record.ok() && record->version == epoch &&
                        (record->value == kParkedValue || record->value == MyOwnerValue());
  if (!may_drop) return false;
  if (current) {
    const absl::Status deleted = store_->DeleteManifest(current->name, current->version,
                                                        WriteFence{RecordKey(id), epoch}, deadline);
    if (!deleted.ok() && !absl::IsNotFound(deleted)) return deleted;
  }
  // Last: a writer of this epoch finds no record then, and is refused too.
  const absl::StatusOr<uint64_t> removed =
      store_->CompareAndSetRecord(kOwnerRecordKind, RecordKey(id), epoch, std::nullopt, deadline);
  if (!removed.ok() && GetReason(removed.status()) != error_reason::kVersionMismatch) {
    return removed.status();
  }
  Forget(id, epoch);
  return true;
}

}  // namespace pagetide
