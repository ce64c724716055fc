// Several threads, each with sequences of its own that began as forks of one: every kind of edit,
// appends, steps, forks and reads at once, through a pool smaller than what they hold, so that
// pages are shared, copied, spilled and restored meanwhile. Each thread compares every row that it
// reads with plain arrays of its own. PAGETIDE_TEST_SEED replays a thread's choices, not their
// timing.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "absl/strings/numbers.h"
#include "tests/worker/model_host_fixture.h"

namespace pagetide {
namespace {

constexpr int kThreads = 6;
constexpr int kSteps = 1000;

struct Row {
  uint64_t content = 0;
  int64_t position = 0;
};

class Client {
 public:
  Client(HostUnderTest* t, uint64_t seed, std::atomic<uint64_t>* contents)
      : t_(*t), rng_(seed), contents_(*contents) {}

  // False, and why, at the first difference.
  bool Begin(const SequenceInfo& base, const std::vector<Row>& rows) {
    auto fork = t_.host->Fork(t_.tenant, {base.id, base.epoch, std::nullopt}, std::nullopt, Late());
    if (!Check(fork.status(), "fork")) return false;
    own_.push_back({fork->info, rows});
    return true;
  }
  bool Step() {
    One& one = own_[rng_() % own_.size()];
    const uint64_t n = one.rows.size();
    switch (rng_() % 12) {
      case 0:
      case 1:
      case 2:
        return n > 150 || Append(one, 1 + rng_() % 12);
      case 3: {
        const int64_t p0 = rng_() % 60, p1 = p0 + rng_() % 20;
        std::erase_if(one.rows,
                      [&](const Row& row) { return row.position >= p0 && row.position < p1; });
        return Edit(RemoveRangeEdit{one.info.number, {p0, p1}}, {&one});
      }
      case 4: {
        if (n < 12) return true;
        const uint64_t keep = rng_() % 5, discard = 1 + rng_() % 6;
        const int64_t delta = one.rows[keep].position - one.rows[keep + discard].position;
        one.rows.erase(one.rows.begin() + keep, one.rows.begin() + keep + discard);
        for (uint64_t i = keep; i < one.rows.size(); ++i) one.rows[i].position += delta;
        return Edit(ShiftWindowEdit{one.info.number,
                                    {.keep = static_cast<int64_t>(keep),
                                     .discard = static_cast<int64_t>(discard)}},
                    {&one});
      }
      case 5: {
        const int64_t from = rng_() % 80;
        for (Row& row : one.rows) row.position += row.position >= from ? 3 : 0;
        return Edit(
            ShiftPositionsEdit{.sequence = one.info.number, .range = {from, -1}, .delta = 3},
            {&one});
      }
      case 6: {
        const uint64_t length = rng_() % (n + 1);
        one.rows.resize(length);
        return Edit(RewindEdit{one.info.number, static_cast<int64_t>(length)}, {&one});
      }
      case 7: {
        if (own_.size() > 3) {
          const SequenceInfo gone = own_.front().info;
          own_.erase(own_.begin());
          return Check(t_.host->Close(t_.tenant, gone.id, gone.epoch), "close");
        }
        const uint64_t length = rng_() % (n + 1);
        auto fork =
            t_.host->Fork(t_.tenant, {one.info.id, one.info.epoch, std::nullopt}, length, Late());
        if (!Check(fork.status(), "fork")) return false;
        own_.push_back({fork->info, {one.rows.begin(), one.rows.begin() + length}});
        return true;
      }
      case 8: {
        One& other = own_[rng_() % own_.size()];
        if (&other == &one) return true;
        std::swap(one.rows, other.rows);
        return Edit(ReorderEdit{.sequences = {one.info.number, other.info.number},
                                .order = {1, 0},
                                .allow_repeats = false},
                    {&one, &other});
      }
      case 9:
        return Check(
            t_.host
                ->Compact(t_.tenant, {one.info.id, one.info.epoch, std::nullopt}, 64, false, Late())
                .status(),
            "compact");
      default:
        return Verify(one);
    }
  }
  bool End() {
    for (const One& one : own_) {
      if (!Verify(one)) return false;
      if (!Check(t_.host->Close(t_.tenant, one.info.id, one.info.epoch), "close")) return false;
    }
    return true;
  }
  const std::string& why() const { return why_; }
  uint64_t rows_checked() const { return rows_checked_; }

 private:
  struct One {
    SequenceInfo info;
    std::vector<Row> rows;
  };
  static MonotonicTime Late() { return HostUnderTest::In(absl::Seconds(300)); }

  bool Check(const absl::Status& status, absl::string_view what) {
    if (!status.ok()) why_ = absl::StrCat(what, ": ", status.ToString());
    return status.ok();
  }
  bool Edit(const SequenceEdit& edit, const std::vector<One*>& named) {
    std::vector<SequenceHandle> handles;
    for (const One* one : named) handles.push_back({one->info.id, one->info.epoch, std::nullopt});
    return Check(t_.host->Edit(t_.tenant, handles, {&edit, 1}).status(),
                 absl::StrCat("edit ", edit.index()));
  }
  bool Append(One& one, uint32_t count) {
    const ReserveItem item{{one.info.id, one.info.epoch, std::nullopt}, count};
    auto slots = t_.host->Reserve(t_.tenant, {&item, 1}, absl::Minutes(5), false, Late());
    if (!Check(slots.status(), "reserve")) return false;
    const PendingSlot& slot = slots->front();
    const uint64_t first = contents_.fetch_add(count);
    for (uint32_t g = 0; g < t_.model->geometry().num_groups(); ++g) {
      const GroupGeometry& geometry = t_.model->geometry().group(g);
      for (uint32_t layer = 0; layer < geometry.num_layers(); ++layer) {
        for (RowKind kind : {RowKind::kK, RowKind::kV}) {
          const uint32_t row_bytes = geometry.row_bytes(kind);
          std::vector<std::byte> rows(count * row_bytes);
          for (uint32_t i = 0; i < count; ++i) {
            RowOracle::FillRow(first + i, g, layer, kind,
                               std::span(rows).subspan(i * row_bytes, row_bytes));
          }
          const absl::Status written = t_.host->WriteRows(
              t_.tenant, one.info.id, slot.pending_id, {g, layer, kind, 0, count}, rows.size(),
              [&](uint64_t offset, std::span<std::byte> dst) {
                std::memcpy(dst.data(), rows.data() + offset, dst.size());
              });
          if (!Check(written, "write")) return false;
        }
      }
    }
    // Tokens that no two rows share: nobody else's page can take the place of one.
    std::vector<uint32_t> tokens;
    for (uint32_t i = 0; i < count; ++i) {
      tokens.push_back(static_cast<uint32_t>(first + i));
      one.rows.push_back({first + i, static_cast<int64_t>(slot.first_position) + i});
    }
    return Check(t_.host->Commit(t_.tenant, item.sequence, slot.pending_id, tokens).status(),
                 "commit");
  }
  bool Verify(const One& one) {
    const GroupGeometry& geometry = t_.model->geometry().group(0);
    auto extents = t_.host->QueryExtent(t_.tenant, one.info.id);
    if (!Check(extents.status(), "extent")) return false;
    const int64_t last = one.rows.empty() ? -1 : one.rows.back().position;
    if (extents->groups[0].rows != one.rows.size() || extents->groups[0].max != last) {
      why_ = absl::StrCat("extent: ", extents->groups[0].rows, " rows up to ",
                          extents->groups[0].max, ", expected ", one.rows.size(), " up to ", last);
      return false;
    }
    auto rows = t_.host->PinRows(t_.tenant, one.info.id, 0, 0, 0, Late());
    if (!Check(rows.status(), "read")) return false;
    std::vector<std::byte> expected(geometry.row_bytes(RowKind::kK));
    std::vector<std::byte> bytes(expected.size());
    for (const auto& run : (*rows)->Runs(1, RowKind::kK)) {
      for (uint32_t i = 0; i < run.num_tokens; ++i) {
        RowOracle::FillRow(one.rows[run.first_token + i].content, 0, 1, RowKind::kK, expected);
        if (!Check(t_.host->pool().Read(run.offset + i * bytes.size(), bytes), "read"))
          return false;
        if (bytes != expected) {
          why_ = absl::StrCat("row ", run.first_token + i, " of ", one.info.id.ToString(),
                              " is not what was written");
          return false;
        }
        ++rows_checked_;
      }
    }
    return true;
  }

  HostUnderTest& t_;
  std::mt19937_64 rng_;
  std::atomic<uint64_t>& contents_;
  std::vector<One> own_;
  std::string why_;
  uint64_t rows_checked_ = 0;
};

TEST(ConcurrentEditsTest, ForksOfOneSequenceAreEditedAtOnce) {
  uint64_t seed = 20261121;
  if (const char* text = std::getenv("PAGETIDE_TEST_SEED")) {
    ASSERT_TRUE(absl::SimpleAtoi(text, &seed));
  }
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  HostUnderTest t({.page_tokens = 8, .num_frames = 160});
  // The rows of the sequence that all begin with: RowOracle's of its tokens.
  const std::vector<uint32_t> tokens = Tokens(1u << 30, 100);
  auto base = t.OpenAndFill(tokens);
  ASSERT_TRUE(base.ok()) << base.status();
  std::vector<Row> rows;
  uint64_t state = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    state = RowOracle::Fold(state, tokens[i]);
    rows.push_back({state, static_cast<int64_t>(i)});
  }
  std::atomic<uint64_t> contents{1};
  std::vector<std::unique_ptr<Client>> clients;
  std::vector<std::thread> threads;
  for (int n = 0; n < kThreads; ++n) {
    clients.push_back(std::make_unique<Client>(&t, seed + n, &contents));
    threads.emplace_back([&, client = clients.back().get()] {
      if (!client->Begin(*base, rows)) return;
      for (int step = 0; step < kSteps; ++step) {
        if (!client->Step()) return;
      }
      client->End();
    });
  }
  for (std::thread& thread : threads) thread.join();
  uint64_t rows_checked = 0;
  for (const auto& client : clients) {
    EXPECT_EQ(client->why(), "");
    rows_checked += client->rows_checked();
  }
  EXPECT_GT(rows_checked, 10000u);
  EXPECT_EQ(*t.WrongRows(base->id, tokens), 0u);
  ASSERT_TRUE(t.host->Close(t.tenant, base->id, base->epoch).ok());
  t.host->Quiesce();
  t.host->ClearCache(false);
  const PoolUsage usage = t.host->Usage().front();
  EXPECT_EQ(usage.free_frames, usage.num_frames);
}

}  // namespace
}  // namespace pagetide
