#include "worker/engine_transfer.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/error_info.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "worker/loaded_rows.h"

namespace pagetide {
namespace {

// How soon a job that waits for a copy of a sequence's tail notices that it was stopped.
constexpr absl::Duration kForkSlice = absl::Milliseconds(200);
constexpr absl::Duration kForkPause = absl::Milliseconds(10);
// How often a load looks for a shorter prefix because a page of the one it found was lost.
constexpr int kMaxLookAgain = 4;

// A sequence of the transfer's own, closed at the end.
class OwnSequence {
 public:
  OwnSequence(const EngineTransfer& transfer, EngineTransferJob* job, SequenceInfo info)
      : transfer_(transfer), job_(job), info_(std::move(info)) {
    job_->Attach(transfer_.host, transfer_.tenant, info_);
  }
  ~OwnSequence() {
    job_->Detach();
    const absl::Status closed = transfer_.host->Close(transfer_.tenant, info_.id, info_.epoch);
    if (!closed.ok()) LogWarning("worker", "close the sequence of a job: ", closed.message());
  }
  OwnSequence(const OwnSequence&) = delete;
  OwnSequence& operator=(const OwnSequence&) = delete;

  SequenceId id() const { return info_.id; }
  SequenceHandle handle() const { return {info_.id, info_.epoch, std::nullopt}; }

 private:
  const EngineTransfer& transfer_;
  EngineTransferJob* const job_;
  const SequenceInfo info_;
};

absl::Status CheckGoesOn(const EngineTransfer& transfer, const EngineTransferJob& job,
                         const EngineProgress& progress) {
  if (job.is_stopped()) return absl::CancelledError("the job was stopped");
  if (transfer.clock->MonotonicNow() < transfer.deadline) return absl::OkStatus();
  return absl::DeadlineExceededError(absl::StrCat("the job's time is up after ",
                                                  progress.usable_tokens, " of ",
                                                  transfer.num_tokens, " tokens"));
}

// Tokens at a time: whole pages, of which a small pool can hold as many beside others' pages.
uint64_t StepTokens(const EngineTransfer& transfer) {
  uint64_t frames = std::numeric_limits<uint64_t>::max();
  for (const PoolUsage& pool : transfer.host->Usage()) frames = std::min(frames, pool.num_frames);
  const uint64_t pages =
      std::clamp<uint64_t>(frames / 2, 1, std::max<uint32_t>(1, transfer.pages_per_step));
  return pages * transfer.host->model().geometry().page_tokens();
}

// The open sequence's rows as they are now. A wait for the frame of its tail is made of short ones,
// so that the job can be stopped.
absl::StatusOr<SequenceInfo> ForkOf(const EngineTransfer& transfer, const EngineTransferJob& job) {
  for (;;) {
    PT_RETURN_IF_ERROR(CheckGoesOn(transfer, job, {}));
    PT_ASSIGN_OR_RETURN(const SequenceInfo source,
                        transfer.host->Get(transfer.tenant, *transfer.sequence));
    const MonotonicTime slice =
        std::min(transfer.deadline, transfer.clock->MonotonicNow() + kForkSlice);
    const auto fork = transfer.host->Fork(transfer.tenant, {source.id, source.epoch, std::nullopt},
                                          transfer.num_tokens, slice, /*is_unlisted=*/true);
    if (fork.ok()) return fork->info;
    const bool waits = absl::IsDeadlineExceeded(fork.status()) || absl::IsAborted(fork.status()) ||
                       GetReason(fork.status()) == error_reason::kPoolExhausted;
    if (!waits || slice == transfer.deadline) return fork.status();
    // A full line of waiting calls answers at once.
    if (!absl::IsDeadlineExceeded(fork.status())) absl::SleepFor(kForkPause);
  }
}

// Rows [begin, end) of one group, all layers, into the engine's blocks. Returns the bytes.
absl::StatusOr<uint64_t> LoadRows(const EngineTransfer& transfer, const EngineTransferJob& job,
                                  SequenceId id, uint32_t group, uint64_t begin, uint64_t end) {
  ModelHost* const host = transfer.host;
  const GroupGeometry& geometry = host->model().geometry().group(group);
  PT_ASSIGN_OR_RETURN(const auto pinned,
                      host->PinRows(transfer.tenant, id, group, begin, end, transfer.deadline));
  const std::vector<int64_t> slots =
      transfer.layout->Slots(MapOf(transfer.maps, group), begin, end);
  uint64_t num_bytes = 0;
  std::vector<EngineLayout::Rows> rows;
  std::vector<std::vector<std::byte>> turned;  // rows whose shift was still pending
  for (uint32_t layer = 0; layer < geometry.num_layers(); ++layer) {
    for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
      if (geometry.row_bytes(kind) == 0) continue;
      if (job.is_stopped()) return absl::CancelledError("the job was stopped");
      rows.clear();
      turned.clear();
      for (const ModelHost::PinnedRows::Run& run : pinned->Runs(layer, kind)) {
        EngineLayout::Rows from{
            .pool_offset = run.offset,
            .slots = std::span(slots).subspan(run.first_token - begin, run.num_tokens)};
        if (run.shift != 0) {
          std::vector<std::byte>& copy = turned.emplace_back(run.num_bytes);
          PT_RETURN_IF_ERROR(
              host->pool().ReadShifted(geometry, run.offset, run.num_tokens, run.shift, copy));
          from.host = copy.data();
        }
        rows.push_back(from);
        num_bytes += run.num_bytes;
      }
      PT_RETURN_IF_ERROR(transfer.layout->Move(EngineLayout::Direction::kToEngine, group, layer,
                                               kind, rows, &host->pool()));
    }
  }
  return num_bytes;
}

// Rows of tokens [at, at + count) of all groups into an append's frames.
absl::Status FillAppend(const EngineTransfer& transfer, const EngineTransferJob& job,
                        const PendingSlot& slot, const EngineProgress& progress) {
  const PageGeometry& geometry = transfer.host->model().geometry();
  const uint32_t page_tokens = geometry.page_tokens();
  std::vector<std::byte> scratch;  // rows of one page, layer and kind
  for (uint32_t g = 0; g < geometry.num_groups(); ++g) {
    const GroupGeometry& group = geometry.group(g);
    const std::vector<int64_t> slots = transfer.layout->Slots(
        MapOf(transfer.maps, g), slot.first_row, slot.first_row + slot.num_tokens);
    for (uint32_t layer = 0; layer < group.num_layers(); ++layer) {
      for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
        const uint64_t row_bytes = group.row_bytes(kind);
        if (row_bytes == 0) continue;
        PT_RETURN_IF_ERROR(CheckGoesOn(transfer, job, progress));
        scratch.resize(page_tokens * row_bytes);
        for (uint32_t first = 0; first < slot.num_tokens; first += page_tokens) {
          const EngineLayout::Rows rows{.host = scratch.data(),
                                        .slots = std::span(slots).subspan(first, page_tokens)};
          PT_RETURN_IF_ERROR(transfer.layout->Move(EngineLayout::Direction::kFromEngine, g, layer,
                                                   kind, {&rows, 1}, &transfer.host->pool()));
          PT_RETURN_IF_ERROR(transfer.host->WriteRows(
              transfer.tenant, slot.sequence, slot.pending_id, {g, layer, kind, first, page_tokens},
              scratch.size(), [&](uint64_t offset, std::span<std::byte> dst) {
                std::memcpy(dst.data(), scratch.data() + offset, dst.size());
              }));
        }
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status LoadIntoEngine(const EngineTransfer& transfer, EngineTransferJob* job) {
  ModelHost* const host = transfer.host;
  const PageGeometry& geometry = host->model().geometry();
  EngineProgress progress;
  PT_RETURN_IF_ERROR(CheckGoesOn(transfer, *job, progress));
  LoadedRows loaded(geometry, transfer.maps);
  std::optional<OwnSequence> sequence;
  uint64_t found = 0;  // rows that there are, or were
  uint64_t end = 0;    // of those that are worth loading
  const auto look_up = [&]() -> absl::Status {
    sequence.reset();
    SequenceInfo info;
    if (transfer.sequence) {
      PT_ASSIGN_OR_RETURN(info, ForkOf(transfer, *job));
    } else {
      const PromptOptions options{.allow_full_reuse = transfer.allow_full_reuse,
                                  .is_unlisted = true};
      PT_ASSIGN_OR_RETURN(OpenResult opened,
                          host->Open(transfer.tenant, transfer.tokens, transfer.inputs, options));
      info = std::move(opened.info);
      if (!progress.reuse) progress.reuse = std::move(opened.reuse);
    }
    found = std::max(found, info.length);
    sequence.emplace(transfer, job, std::move(info));
    return absl::OkStatus();
  };
  const auto plan = [&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(SequenceContents contents,
                        host->ReadContents(transfer.tenant, sequence->id()));
    PT_ASSIGN_OR_RETURN(end, loaded.Plan(std::move(contents)));
    return absl::OkStatus();
  };
  const auto report = [&] {
    const LoadedRows::Usable usable = loaded.UsableOf(found);
    progress.usable_tokens = usable.tokens;
    progress.limiting_group = usable.limiting_group;
    job->Report(progress);
  };
  PT_RETURN_IF_ERROR(look_up());
  bool forgets = false;
  for (uint32_t g = 0; g < geometry.num_groups(); ++g) {
    forgets = forgets || TraitsOf(geometry.group(g).spec()).forgets();
  }
  job->Report(progress);
  PT_RETURN_IF_ERROR(plan());
  report();

  absl::Status lost;
  int num_lost = 0;
  const uint64_t step = StepTokens(transfer);
  const uint64_t first = loaded.first_mapped() - loaded.first_mapped() % geometry.page_tokens();
  uint64_t at = first;
  while (at < end) {
    PT_RETURN_IF_ERROR(CheckGoesOn(transfer, *job, progress));
    const uint64_t next = std::min(end, at + step);
    absl::Status status;
    for (uint32_t g = 0; g < geometry.num_groups() && status.ok(); ++g) {
      // One group after the other: who held the frames of one and waited for another's could wait
      // for a call that waits for him.
      for (const RowSpan& span : loaded.Wanted(g, at, next)) {
        const auto moved = LoadRows(transfer, *job, sequence->id(), g, span.begin, span.end);
        status = moved.status();
        if (!status.ok()) break;
        loaded.Add(g, span);
        progress.moved_bytes += *moved;
        progress.moved_pages +=
            (span.end - 1) / geometry.page_tokens() - span.begin / geometry.page_tokens() + 1;
      }
    }
    report();
    if (GetReason(status) == "PREFIX_LOST" && ++num_lost <= kMaxLookAgain) {
      // What stands in front of the lost page is loaded all the same. Behind a shorter prefix the
      // window begins earlier, in pages that this sequence does not hold and others may.
      if (forgets && !transfer.sequence) PT_RETURN_IF_ERROR(look_up());
      const absl::Status planned = plan();
      lost = std::move(status);
      if (!planned.ok()) return lost;
      at = first;
      continue;
    }
    PT_RETURN_IF_ERROR(status);
    at = next;
  }
  return progress.usable_tokens == found ? absl::OkStatus() : lost;
}

absl::Status StoreFromEngine(const EngineTransfer& transfer, EngineTransferJob* job) {
  ModelHost* const host = transfer.host;
  const PageGeometry& geometry = host->model().geometry();
  const uint64_t page_tokens = geometry.page_tokens();
  EngineProgress progress;
  PT_RETURN_IF_ERROR(CheckGoesOn(transfer, *job, progress));
  // Only full pages have keys.
  const auto full =
      std::span(transfer.tokens).first(transfer.tokens.size() / page_tokens * page_tokens);
  if (full.empty()) return absl::OkStatus();
  std::vector<PositionedInput> inputs = transfer.inputs;
  std::erase_if(inputs,
                [&](const PositionedInput& input) { return input.position >= full.size(); });
  const PromptOptions options{
      .allow_full_reuse = true, .whole_pages_only = true, .is_copied = true, .is_unlisted = true};
  // First without effect: an open would restore what only the store has.
  PT_ASSIGN_OR_RETURN(const PrefixReuse known,
                      host->LookupPrefix(transfer.tenant, full, inputs, options));
  progress.usable_tokens = known.reused_tokens;
  progress.known_pages = known.reused_tokens / page_tokens * geometry.num_groups();
  if (known.reused_tokens == full.size()) {
    job->Report(progress);
    return absl::OkStatus();
  }
  PT_ASSIGN_OR_RETURN(const OpenResult opened, host->Open(transfer.tenant, full, inputs, options));
  const OwnSequence sequence(transfer, job, opened.info);
  uint64_t length = opened.info.length;
  progress.usable_tokens = length;
  progress.known_pages = length / page_tokens * geometry.num_groups();
  job->Report(progress);
  uint64_t first = 0;
  for (const EngineSlotMap& map : transfer.maps) first = std::max(first, map.first_token);
  if (first > length && length < full.size()) {
    return WithReason(
        absl::FailedPreconditionError(absl::StrCat("store pages: tokens [", length, ", ", first,
                                                   ") are neither known nor in the slot "
                                                   "map: give their blocks too")),
        "PREFIX_UNKNOWN", {{"known_tokens", absl::StrCat(length)}});
  }
  const uint64_t step = StepTokens(transfer);
  size_t input = 0;
  while (input < inputs.size() && inputs[input].position < length) ++input;
  while (length < full.size()) {
    PT_RETURN_IF_ERROR(CheckGoesOn(transfer, *job, progress));
    const uint64_t count = std::min<uint64_t>(step, full.size() - length);
    size_t end = input;
    while (end < inputs.size() && inputs[end].position < length + count) ++end;
    PT_ASSIGN_OR_RETURN(const PendingSlot slot,
                        host->BeginAppend(transfer.tenant, sequence.handle(), "store", length,
                                          full.subspan(length, count),
                                          std::span(inputs).subspan(input, end - input),
                                          /*pin_prefix=*/false, transfer.deadline));
    PT_RETURN_IF_ERROR(FillAppend(transfer, *job, slot, progress));
    PT_ASSIGN_OR_RETURN(const CommitResult done,
                        host->Commit(transfer.tenant, sequence.handle(), slot.pending_id, {}));
    input = end;
    length = done.info.length;
    progress.usable_tokens = length;
    progress.moved_pages += done.pages_filled;
    for (uint32_t g = 0; g < geometry.num_groups(); ++g) {
      progress.moved_bytes += count / page_tokens * geometry.group(g).page_bytes();
    }
    job->Report(progress);
  }
  return absl::OkStatus();
}

}  // namespace pagetide
