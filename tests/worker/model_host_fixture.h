// A ModelHost over the CPU device and the memory store, and the calls an engine makes of it.
#ifndef PAGETIDE_TESTS_WORKER_MODEL_HOST_FIXTURE_H_
#define PAGETIDE_TESTS_WORKER_MODEL_HOST_FIXTURE_H_

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "base/error_info.h"
#include "base/executor.h"
#include "kvstore/memory_page_store.h"
#include "tests/worker/row_oracle.h"
#include "worker/cpu_device.h"
#include "worker/model_host.h"

namespace pagetide {

inline std::vector<uint32_t> Tokens(uint32_t first, uint32_t count) {
  std::vector<uint32_t> tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

inline std::vector<uint32_t> Concat(std::vector<uint32_t> a, const std::vector<uint32_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// window_tokens > 0: the last group has a sliding window.
inline std::shared_ptr<const Model> TestModel(uint32_t page_tokens, int num_groups = 1,
                                              bool batch_invariant = false,
                                              uint32_t window_tokens = 0) {
  ModelSpec spec;
  spec.name = "test";
  spec.batch_invariant = batch_invariant;
  spec.geometry.page_tokens = page_tokens;
  for (int g = 0; g < num_groups; ++g) {
    LayerGroupSpec group;
    group.layers = g == 0 ? std::vector<uint32_t>{0, 2} : std::vector<uint32_t>{1};
    group.kv_heads = 1;
    group.k_dim = 8;
    group.v_dim = 4;
    group.k_type = group.v_type = DataType::kF32;
    if (g + 1 == num_groups && window_tokens > 0) {
      group.kind = LayerGroupSpec::Kind::kWindow;
      group.window_type = LayerGroupSpec::WindowType::kStandard;
      group.window_tokens = window_tokens;
    }
    spec.geometry.groups.push_back(group);
  }
  return std::make_shared<const Model>(Model::Create(std::move(spec)).value());
}

// A ring that keeps some rows, a state, and pages of the engine's own, beside full attention.
inline std::shared_ptr<const Model> MixedModel(uint32_t page_tokens, uint32_t window_tokens,
                                               uint32_t keep_tokens) {
  ModelSpec spec = TestModel(page_tokens)->spec();
  LayerGroupSpec ring = spec.geometry.groups.front();
  ring.layers = {1};
  ring.kind = LayerGroupSpec::Kind::kWindow;
  ring.window_type = LayerGroupSpec::WindowType::kRing;
  ring.window_tokens = window_tokens;
  ring.keep_tokens = keep_tokens;
  LayerGroupSpec state;
  state.kind = LayerGroupSpec::Kind::kRecurrent;
  state.layers = {3};
  state.opaque_bytes = 200;
  LayerGroupSpec opaque = state;
  opaque.kind = LayerGroupSpec::Kind::kOpaque;
  opaque.layers = {4};
  opaque.opaque_bytes = 333;
  for (const LayerGroupSpec& group : {ring, state, opaque}) spec.geometry.groups.push_back(group);
  return std::make_shared<const Model>(Model::Create(std::move(spec)).value());
}

class HostUnderTest {
 public:
  struct Setup {
    uint32_t page_tokens = 16;
    int num_groups = 1;
    uint32_t num_frames = 16;
    bool write_through = true;
    PageStore* store = nullptr;  // null: a memory store of its own
    bool no_store = false;
    uint64_t incarnation = 7;
    int io_threads = 2;
    bool batch_invariant = false;
    uint32_t max_overtakes = 64;
    uint64_t max_known_stored_pages = 65536;
    absl::Duration store_backoff = absl::Milliseconds(20);
    absl::Duration sequence_idle = absl::ZeroDuration();
    std::shared_ptr<const Model> model;  // null: TestModel
    Device* device = nullptr;            // null: a CPU device of its own
    Clock* clock = Clock::Real();        // the host's; In and Soon are of the real one
    uint32_t window_tokens = 0;          // above 0: the last group of TestModel is a window
    uint64_t checkpoint_host_bytes = 1 << 20;
    uint32_t checkpoint_every_pages = 0;
    // A host of somebody else's, over TestModel(page_tokens, num_groups); null: one of its own.
    ModelHost* existing = nullptr;
  };
  explicit HostUnderTest(const Setup& setup)
      : model(setup.model != nullptr ? setup.model
                                     : TestModel(setup.page_tokens, setup.num_groups,
                                                 setup.batch_invariant, setup.window_tokens)),
        store(setup.no_store           ? nullptr
              : setup.store != nullptr ? setup.store
                                       : &own_store),
        io({.name = "io", .num_threads = setup.io_threads, .max_queue = 1024}) {
    ModelHost::Options options;
    options.pool_bytes = setup.num_frames * model->geometry().bytes_per_page_of_tokens();
    options.incarnation = setup.incarnation;
    options.write_through = setup.write_through;
    options.max_overtakes = setup.max_overtakes;
    options.max_known_stored_pages = setup.max_known_stored_pages;
    options.store_backoff = setup.store_backoff;
    options.sequence_idle = setup.sequence_idle;
    options.checkpoint_host_bytes = setup.checkpoint_host_bytes;
    options.checkpoint_every_pages = setup.checkpoint_every_pages;
    host = setup.existing;
    if (host != nullptr) return;
    own_host = ModelHost::Create(options, model, setup.device != nullptr ? setup.device : &device,
                                 store, &io, setup.clock)
                   .value();
    host = own_host.get();
  }
  ~HostUnderTest() { host->Quiesce(); }

  static MonotonicTime In(absl::Duration d) { return Clock::Real()->MonotonicNow() + d; }
  static MonotonicTime Soon() { return In(absl::Seconds(20)); }

  // Writes the rows of tokens [base, base + count) of `all` into a pending write.
  absl::Status WriteAll(const PendingSlot& slot, std::span<const uint32_t> all) {
    for (uint32_t g = 0; g < model->geometry().num_groups(); ++g) {
      const GroupGeometry& geometry = model->geometry().group(g);
      if (!geometry.has_rows()) {
        const absl::Status written = WriteWhole(slot, all, g);
        if (!written.ok()) return written;
        continue;
      }
      for (uint32_t layer = 0; layer < geometry.num_layers(); ++layer) {
        for (RowKind kind : {RowKind::kK, RowKind::kV}) {
          const std::vector<std::byte> rows =
              RowOracle::Rows(all, slot.first_position, slot.first_position + slot.num_tokens, g,
                              layer, kind, geometry.row_bytes(kind));
          const absl::Status status = host->WriteRows(
              tenant, slot.sequence, slot.pending_id, {g, layer, kind, 0, slot.num_tokens},
              rows.size(), [&](uint64_t offset, std::span<std::byte> dst) {
                std::memcpy(dst.data(), rows.data() + offset, dst.size());
              });
          if (!status.ok()) return status;
        }
      }
    }
    return absl::OkStatus();
  }

  // What a page that is whole, or a state, holds: a function of the tokens up to its last.
  static std::vector<std::byte> WholePage(const GroupGeometry& geometry, uint32_t group,
                                          std::span<const uint32_t> tokens) {
    std::vector<std::byte> page(geometry.page_bytes());
    RowOracle::FillRow(RowOracle::StateOf(tokens), group, 0, RowKind::kPage, page);
    return page;
  }
  // In two parts each.
  absl::Status WriteWhole(const PendingSlot& slot, std::span<const uint32_t> all, uint32_t g) {
    const GroupGeometry& geometry = model->geometry().group(g);
    const uint64_t page_tokens = geometry.page_tokens();
    const uint64_t end = slot.first_row + slot.num_tokens;
    const bool is_state = geometry.spec().kind == LayerGroupSpec::Kind::kRecurrent;
    uint64_t last = is_state ? end : slot.first_row / page_tokens * page_tokens;
    for (uint32_t p = 0; p == 0 || last < end; ++p) {
      last = std::min(end, last + page_tokens);
      const std::vector<std::byte> page = WholePage(geometry, g, all.first(last));
      for (const auto& [from, to] :
           {std::pair<size_t, size_t>(0, 100), std::pair(size_t{100}, page.size())}) {
        const RowRun run{.group = g, .kind = RowKind::kPage, .page = p, .page_offset = from};
        const absl::Status status =
            host->WriteRows(tenant, slot.sequence, slot.pending_id, run, to - from,
                            [&](uint64_t offset, std::span<std::byte> dst) {
                              std::memcpy(dst.data(), page.data() + from + offset, dst.size());
                            });
        if (!status.ok()) return status;
      }
    }
    return absl::OkStatus();
  }

  absl::StatusOr<SequenceInfo> Append(const SequenceInfo& info, std::span<const uint32_t> all,
                                      bool pin_prefix = false) {
    auto slot = host->BeginAppend(tenant, {info.id, info.epoch, std::nullopt}, "a", info.length,
                                  all.subspan(info.length), {}, pin_prefix, Soon());
    if (!slot.ok()) return slot.status();
    const absl::Status written = WriteAll(*slot, all);
    if (!written.ok()) return written;
    auto done = host->Commit(tenant, {info.id, info.epoch, std::nullopt}, slot->pending_id, {});
    if (!done.ok()) return done.status();
    return done->info;
  }

  // One decode step.
  absl::StatusOr<SequenceInfo> Step(const SequenceInfo& info, std::span<const uint32_t> all) {
    const ReserveItem item{{info.id, info.epoch, std::nullopt},
                           static_cast<uint32_t>(all.size() - info.length)};
    auto slots = host->Reserve(tenant, {&item, 1}, absl::Seconds(30), false, Soon());
    if (!slots.ok()) return slots.status();
    const absl::Status written = WriteAll(slots->front(), all);
    if (!written.ok()) return written;
    auto done = host->Commit(tenant, {info.id, info.epoch, std::nullopt}, slots->front().pending_id,
                             all.subspan(info.length));
    if (!done.ok()) return done.status();
    return done->info;
  }

  // Opens, appends what was not reused. `reuse` may be null.
  absl::StatusOr<SequenceInfo> OpenAndFill(std::span<const uint32_t> tokens,
                                           PrefixReuse* reuse = nullptr) {
    auto opened = host->Open(tenant, tokens, {}, {});
    if (!opened.ok()) return opened.status();
    if (reuse != nullptr) *reuse = opened->reuse;
    return Append(opened->info, tokens);
  }

  // Watches a sequence until it is resident; the last that was told.
  absl::StatusOr<Readiness> WaitReady(SequenceId id) {
    Readiness last;
    const absl::Status status =
        host->WatchReadiness(tenant, id, Soon(), [&](const Readiness& readiness) {
          last = readiness;
          return true;
        });
    if (!status.ok()) return status;
    if (!last.done) return absl::InternalError("the watch ended before it was done");
    return last;
  }

  // Reads all rows back that a next token could attend to, and counts wrong ones.
  absl::StatusOr<uint64_t> WrongRows(SequenceId id, std::span<const uint32_t> tokens) {
    uint64_t wrong = 0;
    for (uint32_t g = 0; g < model->geometry().num_groups(); ++g) {
      const GroupGeometry& geometry = model->geometry().group(g);
      const int64_t begin =
          TraitsOf(geometry.spec()).FirstVisible(static_cast<int64_t>(tokens.size()));
      auto rows = host->PinRows(tenant, id, g, static_cast<uint64_t>(begin), 0, Soon());
      if (!rows.ok()) return rows.status();
      if ((*rows)->end() != tokens.size()) return absl::InternalError("length differs");
      for (uint32_t layer = 0; layer < geometry.num_layers(); ++layer) {
        for (RowKind kind : {RowKind::kK, RowKind::kV}) {
          const uint32_t row_bytes = geometry.row_bytes(kind);
          const std::vector<std::byte> expected =
              RowOracle::Rows(tokens, 0, tokens.size(), g, layer, kind, row_bytes);
          uint64_t seen = 0;
          for (const auto& run : (*rows)->Runs(layer, kind)) {
            std::vector<std::byte> bytes(run.num_bytes);
            const absl::Status read = host->pool().Read(run.offset, bytes);
            if (!read.ok()) return read;
            for (uint32_t t = 0; t < run.num_tokens; ++t) {
              wrong +=
                  std::memcmp(bytes.data() + t * row_bytes,
                              expected.data() + (run.first_token + t) * row_bytes, row_bytes) != 0;
            }
            seen += run.num_tokens;
          }
          if (seen != tokens.size() - begin) return absl::InternalError("rows are missing");
        }
      }
    }
    return wrong;
  }

  // As WrongRows, of what the groups hold: -1 beside wrong rows is one that the next token needs
  // and that is not there.
  absl::StatusOr<int64_t> WrongHeld(SequenceId id, std::span<const uint32_t> tokens) {
    int64_t wrong = 0;
    for (uint32_t g = 0; g < model->geometry().num_groups(); ++g) {
      const GroupGeometry& geometry = model->geometry().group(g);
      auto rows = host->PinRows(tenant, id, g, ModelHost::kHeldRows, 0, Soon());
      if (!rows.ok()) return rows.status();
      std::vector<bool> is_held(tokens.size(), false);
      const auto compare = [&](uint64_t offset, std::span<const std::byte> expected) {
        std::vector<std::byte> bytes(expected.size());
        wrong += !host->pool().Read(offset, bytes).ok() ||
                 std::memcmp(bytes.data(), expected.data(), bytes.size()) != 0;
      };
      for (const auto& run : (*rows)->Runs(0, RowKind::kPage)) {
        for (uint64_t t = 0; t < run.num_tokens; ++t) is_held[run.first_token + t] = true;
        compare(run.offset, WholePage(geometry, g, tokens.first(run.first_token + run.num_tokens)));
      }
      for (uint32_t layer = 0; geometry.has_rows() && layer < geometry.num_layers(); ++layer) {
        for (RowKind kind : {RowKind::kK, RowKind::kV}) {
          const uint32_t row_bytes = geometry.row_bytes(kind);
          const std::vector<std::byte> expected =
              RowOracle::Rows(tokens, 0, tokens.size(), g, layer, kind, row_bytes);
          for (const auto& run : (*rows)->Runs(layer, kind)) {
            for (uint64_t t = 0; t < run.num_tokens; ++t) is_held[run.first_token + t] = true;
            compare(run.offset,
                    std::span(expected).subspan(run.first_token * row_bytes, run.num_bytes));
          }
        }
      }
      const GroupTraits traits = TraitsOf(geometry.spec());
      const int64_t first = traits.FirstVisible(static_cast<int64_t>(tokens.size()));
      for (int64_t t = 0; t < static_cast<int64_t>(tokens.size()); ++t) {
        if ((t < traits.keep_tokens || t >= first) && !is_held[t]) return -1;
      }
    }
    return wrong;
  }

  const Tenant tenant{"default", DeriveTenantSalt("secret", "default")};
  std::shared_ptr<const Model> model;
  MemoryPageStore own_store;
  PageStore* store;
  CpuDevice device;
  ThreadPoolExecutor io;
  std::unique_ptr<ModelHost> own_host;
  ModelHost* host;
};

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_WORKER_MODEL_HOST_FIXTURE_H_
