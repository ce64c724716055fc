// Plans with chunks: which sessions give them, what their rows are, and what is refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <tuple>

#include "tests/worker/session_fixture.h"
#include "worker/prompt_planner.h"

namespace pagetide {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

MonotonicTime Soon() {
  return HostUnderTest::Soon();
}

std::vector<uint32_t> Concat(std::initializer_list<std::vector<uint32_t>> parts) {
  std::vector<uint32_t> all;
  for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

// One group that turns, one whose K does not depend on the position.
std::shared_ptr<const Model> RotaryModel(bool can_shift = true) {
  ModelSpec spec = TestModel(/*page_tokens=*/16, /*num_groups=*/2)->spec();
  LayerGroupSpec& group = spec.geometry.groups.front();
  group.rope.style = RopeSpec::Style::kNeox;
  group.rope.n_rot = 6;
  if (!can_shift) group.basis = LayerGroupSpec::Basis::kHadamard;
  return std::make_shared<const Model>(Model::Create(std::move(spec)).value());
}

// A row as its page holds it, and by how many positions K is turned when it is read.
struct HeldRow {
  std::string bytes;
  int32_t shift = 0;
  friend bool operator==(const HeldRow&, const HeldRow&) = default;
};
using HeldRows = std::map<std::tuple<uint32_t, uint32_t, RowKind>, std::vector<HeldRow>>;

HeldRows RowsOf(SessionWorker& worker, SequenceId id) {
  HeldRows all;
  const HostUnderTest& t = *worker.engine;
  for (uint32_t g = 0; g < t.model->geometry().num_groups(); ++g) {
    const GroupGeometry& group = t.model->geometry().group(g);
    auto rows = t.host->PinRows(t.tenant, id, g, 0, 0, Soon());
    EXPECT_TRUE(rows.ok()) << rows.status();
    if (!rows.ok()) return {};
    for (uint32_t layer = 0; layer < group.num_layers(); ++layer) {
      for (RowKind kind : {RowKind::kK, RowKind::kV}) {
        const uint32_t row_bytes = group.row_bytes(kind);
        for (const auto& run : (*rows)->Runs(layer, kind)) {
          std::vector<std::byte> bytes(run.num_bytes);
          EXPECT_TRUE(t.host->pool().Read(run.offset, bytes).ok());
          for (uint32_t row = 0; row < run.num_tokens; ++row) {
            all[{g, layer, kind}].push_back(
                {std::string(reinterpret_cast<const char*>(bytes.data()) + row * row_bytes,
                             row_bytes),
                 kind == RowKind::kK ? run.shift : 0});
          }
        }
      }
    }
  }
  return all;
}

class PromptChunksTest : public ::testing::Test {
 protected:
  // The session's rows are those that the oracle gives its tokens.
  void Save(const std::vector<uint32_t>& tokens, const std::string& name) {
    SessionWorker writer(
        &store_, {.id = absl::StrCat("w-", name), .incarnation = ++lives_, .model = model_});
    auto info = writer.engine->OpenAndFill(tokens);
    ASSERT_TRUE(info.ok()) << info.status();
    ASSERT_TRUE(writer.Save(*info, name).ok());
  }
  absl::StatusOr<PromptPlan> Plan(SessionWorker& worker, const std::vector<uint32_t>& prompt,
                                  const std::vector<std::string>& sessions, uint32_t min_chunk,
                                  PromptOptions options = {}) {
    return PromptPlanner(worker.sessions.get())
        .Plan(worker.tenant(), worker.host(),
              {.tokens = prompt, .options = options, .min_chunk_tokens = min_chunk}, sessions,
              Soon());
  }
  absl::StatusOr<OpenResult> Open(SessionWorker& worker, const std::vector<uint32_t>& prompt,
                                  const PromptPlan& plan, uint32_t min_chunk) {
    return PromptPlanner(worker.sessions.get())
        .Open(worker.tenant(), worker.host(), {.tokens = prompt, .min_chunk_tokens = min_chunk},
              plan.session, plan.session_version, Soon());
  }
  // What the session's rows make of a sequence that was opened by `plan`: those of the oracle for
  // the saved tokens, to be turned by the distance.
  static void ExpectTurned(SessionWorker& worker, SequenceId id, const std::vector<uint32_t>& saved,
                           const PromptPlan& plan) {
    std::vector<uint64_t> source;  // [row]: of the session
    const uint64_t prefix = plan.reuse.reused_tokens - plan.reuse.chunk_tokens;
    for (uint64_t row = 0; row < prefix; ++row) source.push_back(row);
    for (const ReusedChunk& chunk : plan.chunks) {
      for (uint64_t i = 0; i < chunk.count; ++i) source.push_back(chunk.session_begin + i);
    }
    const HeldRows rows = RowsOf(worker, id);
    ASSERT_FALSE(rows.empty());
    for (const auto& [where, held] : rows) {
      const auto [g, layer, kind] = where;
      const GroupGeometry& group = worker.engine->model->geometry().group(g);
      const uint32_t row_bytes = group.row_bytes(kind);
      const std::vector<std::byte> expected =
          RowOracle::Rows(saved, 0, saved.size(), g, layer, kind, row_bytes);
      ASSERT_EQ(held.size(), source.size());
      for (uint64_t row = 0; row < source.size(); ++row) {
        EXPECT_EQ(held[row].bytes, std::string(reinterpret_cast<const char*>(expected.data()) +
                                                   source[row] * row_bytes,
                                               row_bytes))
            << "row " << row << " of group " << g;
        const bool turns = kind == RowKind::kK && g == 0;
        EXPECT_EQ(held[row].shift,
                  turns ? static_cast<int64_t>(row) - static_cast<int64_t>(source[row]) : 0)
            << "row " << row << " of group " << g;
      }
    }
  }

  std::shared_ptr<const Model> model_ = RotaryModel();
  MemoryPageStore store_;
  uint64_t lives_ = 100;
};

const std::vector<uint32_t> kSystem = Tokens(100, 40), kFirst = Tokens(1000, 30),
                            kSecond = Tokens(2000, 50), kThird = Tokens(3000, 24),
                            kNew = Tokens(9000, 5);

TEST_F(PromptChunksTest, NoneUnlessAskedForAndNoneThatAreTooShort) {
  Save(Concat({kSystem, kFirst, kSecond}), "s");
  SessionWorker worker(&store_, {.model = model_});
  const std::vector<uint32_t> prompt = Concat({kSystem, kSecond, kNew});
  auto plan = Plan(worker, prompt, {"s"}, 0);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->chunks, IsEmpty());
  EXPECT_EQ(plan->reuse.reused_tokens, 40u);
  EXPECT_EQ(plan->candidates[1].compute_tokens, 55u);

  plan = Plan(worker, prompt, {"s"}, 51);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->chunks, IsEmpty());
  EXPECT_EQ(plan->reuse.reused_tokens, 40u);
  EXPECT_THAT(plan->candidates[1].why_not_more,
              HasSubstr("none of its tokens behind them are the prompt's next 51"));
  plan = Plan(worker, prompt, {"s"}, 50);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->chunks, ElementsAre(ReusedChunk{70, 40, 50}));

  // A setting that is above what a short prompt has.
  plan = Plan(worker, prompt, {"s"}, std::numeric_limits<uint32_t>::max());
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->chunks, IsEmpty());
  EXPECT_THAT(plan->candidates[1].why_not_more,
              HasSubstr("the prompt goes on for less than a chunk of 4294967295 tokens"));
  plan->session = "s";
  plan->session_version = plan->candidates[1].version;
  auto opened = Open(worker, prompt, *plan, 96);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->info.length, 40u);
  EXPECT_EQ(opened->info.canonical_length, 40u);
}

TEST_F(PromptChunksTest, RowsOfOneChunkAreTheSessionsTurned) {
  const std::vector<uint32_t> saved = Concat({kSystem, kFirst, kSecond});
  Save(saved, "s");
  SessionWorker worker(&store_, {.model = model_});
  const std::vector<uint32_t> prompt = Concat({kSystem, kSecond, kNew});
  auto plan = Plan(worker, prompt, {"s"}, 16);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->chunks, ElementsAre(ReusedChunk{70, 40, 50}));
  EXPECT_EQ(plan->reuse.reused_tokens, 90u);
  EXPECT_EQ(plan->reuse.chunk_tokens, 50u);
  EXPECT_EQ(plan->candidates[1].compute_tokens, 5u);
  EXPECT_THAT(plan->reuse.explanation, HasSubstr("50 more in 1 chunks"));
  EXPECT_EQ(worker.host()->Counters().pages_restored, 0u);  // a plan restores nothing

  auto opened = Open(worker, prompt, *plan, 16);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->info.length, 90u);
  EXPECT_EQ(opened->info.end_position, 90);
  EXPECT_EQ(opened->info.canonical_length, 40u);
  EXPECT_EQ(opened->reuse.reused_tokens, plan->reuse.reused_tokens);
  EXPECT_EQ(opened->reuse.chunk_tokens, plan->reuse.chunk_tokens);
  EXPECT_EQ(opened->reuse.store_tokens, plan->reuse.store_tokens);
  EXPECT_EQ(opened->reuse.device_tokens, plan->reuse.device_tokens);
  EXPECT_EQ(opened->reuse.explanation, plan->reuse.explanation);
  EXPECT_EQ(opened->reuse.limit, plan->reuse.limit);
  ExpectTurned(worker, opened->info.id, saved, *plan);
  EXPECT_EQ(worker.host()->Counters().chunk_tokens_reused, 50u);
  EXPECT_EQ(worker.host()->Counters().tokens_reused, 90u);

  // The same by hand: the whole session, and the edits that llama.cpp's server would make.
  auto whole = worker.Load("s");
  ASSERT_TRUE(whole.ok()) << whole.status();
  const SequenceHandle handle{whole->open.info.id, whole->open.info.epoch, std::nullopt};
  const uint64_t number = handle.id.number;
  const std::vector<SequenceEdit> edits = {RemoveRangeEdit{number, {40, 70}},
                                           ShiftPositionsEdit{number, {70, 120}, -30}};
  auto edited = worker.host()->Edit(worker.tenant(), {&handle, 1}, edits);
  ASSERT_TRUE(edited.ok()) << edited.status();
  EXPECT_EQ(RowsOf(worker, opened->info.id), RowsOf(worker, handle.id));
}

TEST_F(PromptChunksTest, NothingBehindThePrefixIsFoundByAnotherPrompt) {
  Save(Concat({kSystem, kFirst, kSecond}), "s");
  SessionWorker worker(&store_, {.model = model_});
  const std::vector<uint32_t> prompt = Concat({kSystem, kSecond, kNew, Tokens(7000, 40)});
  auto plan = Plan(worker, prompt, {"s"}, 16);
  ASSERT_TRUE(plan.ok()) << plan.status();
  auto opened = Open(worker, prompt, *plan, 16);
  ASSERT_TRUE(opened.ok()) << opened.status();
  // Pages fill behind the chunk.
  auto filled = worker.engine->Append(opened->info, prompt);
  ASSERT_TRUE(filled.ok()) << filled.status();
  EXPECT_EQ(filled->length, prompt.size());
  EXPECT_EQ(filled->canonical_length, 40u);
  ASSERT_TRUE(worker.Save(*filled, "with-chunk").ok());
  SessionWorker other(&store_, {.id = "b", .incarnation = 2, .model = model_});
  for (SessionWorker* each : {&worker, &other}) {
    auto found = each->host()->LookupPrefix(each->tenant(), prompt, {}, {});
    ASSERT_TRUE(found.ok()) << found.status();
    EXPECT_LE(found->reused_tokens, 40u);
  }
  // Who computes it has the pages of it from then on, with the rows that belong to it.
  PrefixReuse reuse;
  auto computed = worker.engine->OpenAndFill(prompt, &reuse);
  ASSERT_TRUE(computed.ok()) << computed.status();
  EXPECT_LE(reuse.reused_tokens, 40u);
  EXPECT_EQ(*worker.engine->WrongRows(computed->id, prompt), 0u);
  worker.host()->Quiesce();
  auto again = other.engine->OpenAndFill(prompt, &reuse);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_GE(reuse.reused_tokens, 128u);
  EXPECT_EQ(*other.engine->WrongRows(again->id, prompt), 0u);
}

TEST_F(PromptChunksTest, SeveralChunksAndOneTokenLeft) {
  const std::vector<uint32_t> saved =
      Concat({kSystem, kFirst, kSecond, Tokens(4000, 7), kThird, Tokens(5000, 9)});
  Save(saved, "s");
  SessionWorker worker(&store_, {.model = model_});
  const std::vector<uint32_t> prompt = Concat({kSystem, kSecond, kThird});
  auto plan = Plan(worker, prompt, {"s"}, 20);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->chunks, ElementsAre(ReusedChunk{70, 40, 50}, ReusedChunk{127, 90, 23}));
  EXPECT_EQ(plan->reuse.reused_tokens, prompt.size() - 1);
  EXPECT_EQ(plan->reuse.limit, ReuseLimit::kWholePrompt);
  auto opened = Open(worker, prompt, *plan, 20);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->info.length, prompt.size() - 1);
  ExpectTurned(worker, opened->info.id, saved, *plan);

  plan = Plan(worker, prompt, {"s"}, 20, {.allow_full_reuse = true});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->reuse.reused_tokens, prompt.size());
  // 23 tokens would be left of the second, which are not enough.
  plan = Plan(worker, prompt, {"s"}, 24);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->chunks, ElementsAre(ReusedChunk{70, 40, 50}));
}

TEST_F(PromptChunksTest, FewestTokensToComputeWinAndExactOnesWhereBothLeaveAsMany) {
  const std::vector<uint32_t> prompt = Concat({kSystem, kSecond, kNew});
  Save(Concat({kSystem, kFirst, kSecond}), "chunked");               // 40 + 50
  Save(Concat({kSystem, Tokens(2000, 50), {77}}), "exact");          // 90
  Save(Concat({kSystem, Tokens(2000, 30), {77}}), "shorter");        // 70
  Save(Concat({kSystem, kFirst, kSecond, {9000, 9001}}), "longer");  // 40 + 52
  SessionWorker worker(&store_, {.model = model_});
  for (const auto& order : std::vector<std::vector<std::string>>{
           {"chunked", "exact"}, {"exact", "chunked"}, {"shorter", "chunked", "exact"}}) {
    auto plan = Plan(worker, prompt, order, 16);
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_EQ(plan->session, "exact");
    EXPECT_THAT(plan->chunks, IsEmpty());
    EXPECT_EQ(plan->reuse.reused_tokens, 90u);
    for (const PlanCandidate& candidate : plan->candidates) {
      EXPECT_EQ(candidate.chunks.size(), candidate.session == "chunked" ? 1u : 0u);
      if (candidate.session == "chunked") {
        EXPECT_EQ(candidate.compute_tokens, 5u);
      }
    }
  }
  auto plan = Plan(worker, prompt, {"shorter", "exact", "chunked", "longer"}, 16);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->session, "longer");
  EXPECT_THAT(plan->chunks, ElementsAre(ReusedChunk{70, 40, 52}));
}

TEST_F(PromptChunksTest, ASessionWithChunksGivesChunksAgain) {
  const std::vector<uint32_t> first = Concat({kSystem, kFirst, kSecond, kThird});
  Save(first, "first");
  const std::vector<uint32_t> prompt = Concat({kSystem, kSecond, kThird, kNew});
  {
    SessionWorker worker(&store_, {.model = model_});
    auto plan = Plan(worker, prompt, {"first"}, 16);
    ASSERT_TRUE(plan.ok()) << plan.status();
    auto opened = Open(worker, prompt, *plan, 16);
    ASSERT_TRUE(opened.ok()) << opened.status();
    ASSERT_EQ(opened->info.length, 114u);
    ASSERT_TRUE(worker.Save(opened->info, "second").ok());
  }
  SessionWorker worker(&store_, {.id = "b", .incarnation = 2, .model = model_});
  const std::vector<uint32_t> next = Concat({kSystem, kThird, kNew});
  auto plan = Plan(worker, next, {"second"}, 16);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->chunks, ElementsAre(ReusedChunk{90, 40, 24}));
  auto opened = Open(worker, next, *plan, 16);
  ASSERT_TRUE(opened.ok()) << opened.status();
  // The rows are those of the first session, turned by both distances at once.
  PromptPlan both = *plan;
  both.chunks = {{120, 40, 24}};
  ExpectTurned(worker, opened->info.id, first, both);
}

TEST_F(PromptChunksTest, AModelThatCannotShiftRefusesAndNothingIsOpen) {
  model_ = RotaryModel(/*can_shift=*/false);
  Save(Concat({kSystem, kFirst, kSecond}), "s");
  SessionWorker worker(&store_, {.model = model_});
  const std::vector<uint32_t> prompt = Concat({kSystem, kSecond, kNew});
  auto plan = Plan(worker, prompt, {"s"}, 16);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->chunks, IsEmpty());
  EXPECT_EQ(plan->reuse.reused_tokens, 40u);
  EXPECT_THAT(plan->candidates[1].why_not_more, HasSubstr("cannot be rotated"));
  const HostCounters before = worker.host()->Counters();
  plan->session = "s";
  plan->session_version = plan->candidates[1].version;
  const absl::Status refused = Open(worker, prompt, *plan, 16).status();
  EXPECT_EQ(GetReason(refused), "CANNOT_SHIFT") << refused;
  EXPECT_TRUE(worker.host()->List(worker.tenant(), 0, 10).empty());
  EXPECT_EQ(worker.host()->Counters().tokens_reused, before.tokens_reused);
  EXPECT_TRUE(Open(worker, prompt, *plan, 0).ok());
}

TEST_F(PromptChunksTest, AStateCannotBeCut) {
  model_ = MixedModel(/*page_tokens=*/16, /*window_tokens=*/256, /*keep_tokens=*/4);
  Save(Concat({kSystem, kFirst, kSecond}), "s");
  SessionWorker worker(&store_, {.num_frames = 64, .model = model_});
  const std::vector<uint32_t> prompt = Concat({kSystem, kSecond, kNew});
  auto plan = Plan(worker, prompt, {"s"}, 16);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->chunks, IsEmpty());
  EXPECT_THAT(plan->candidates[1].why_not_more, HasSubstr("no chunks of it"));
  plan->session = "s";
  plan->session_version = plan->candidates[1].version;
  const absl::Status refused = Open(worker, prompt, *plan, 16).status();
  EXPECT_EQ(GetReason(refused), "CANNOT_CUT") << refused;
  EXPECT_TRUE(worker.host()->List(worker.tenant(), 0, 10).empty());
}

TEST_F(PromptChunksTest, AWindowServesWhatItStillHolds) {
  model_ = TestModel(/*page_tokens=*/16, /*num_groups=*/2, /*batch_invariant=*/false,
                     /*window_tokens=*/24);
  const std::vector<uint32_t> saved = Concat({kSystem, kFirst, kSecond, kThird});
  Save(saved, "s");
  SessionWorker worker(&store_, {.num_frames = 64, .model = model_});
  // To the end of the session: the window holds what the next token sees.
  std::vector<uint32_t> prompt = Concat({kSystem, kSecond, kThird, kNew});
  auto plan = Plan(worker, prompt, {"s"}, 16);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->chunks, ElementsAre(ReusedChunk{70, 40, 74}));
  EXPECT_EQ(plan->candidates[1].usable_tokens, 0u);  // the window holds nothing there
  EXPECT_EQ(plan->candidates[1].compute_tokens, 5u);
  auto opened = Open(worker, prompt, *plan, 16);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->info.length, 114u);
  // Not to its end: those rows were given up.
  prompt = Concat({kSystem, Tokens(2000, 20), kNew});
  plan = Plan(worker, prompt, {"s"}, 16);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->chunks, IsEmpty());
  EXPECT_THAT(plan->candidates[1].why_not_more, HasSubstr("gave up row"));
  EXPECT_EQ(plan->candidates[1].compute_tokens, prompt.size());
  plan->session = "s";
  plan->session_version = plan->candidates[1].version;
  EXPECT_EQ(GetReason(Open(worker, prompt, *plan, 16).status()), "ROWS_RECLAIMED");
  EXPECT_EQ(worker.host()->List(worker.tenant(), 0, 10).size(), 1u);
}

TEST_F(PromptChunksTest, PlanAndOpenCountTheSameRowsOfAWindow) {
  model_ = TestModel(/*page_tokens=*/16, /*num_groups=*/1, /*batch_invariant=*/false,
                     /*window_tokens=*/24);
  Save(Concat({kSystem, kFirst, kSecond, kThird}), "s");
  SessionWorker worker(&store_, {.num_frames = 64, .model = model_});
  const std::vector<uint32_t> prompt = Concat({kSystem, kSecond, kThird, kNew});
  auto plan = Plan(worker, prompt, {"s"}, 16);
  ASSERT_TRUE(plan.ok()) << plan.status();
  ASSERT_THAT(plan->chunks, Not(IsEmpty()));
  auto opened = Open(worker, prompt, *plan, 16);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_GT(opened->reuse.store_tokens, 0u);
  EXPECT_EQ(opened->reuse.store_tokens, plan->reuse.store_tokens);
  EXPECT_EQ(opened->reuse.device_tokens, plan->reuse.device_tokens);
}

TEST_F(PromptChunksTest, APlanThatNoLongerHoldsOpensByKeys) {
  Save(Concat({kSystem, kFirst, kSecond}), "s");
  SessionWorker worker(&store_, {.model = model_});
  const std::vector<uint32_t> prompt = Concat({kSystem, kSecond, kNew});
  auto plan = Plan(worker, prompt, {"s"}, 16);
  ASSERT_TRUE(plan.ok()) << plan.status();
  ASSERT_THAT(plan->chunks, Not(IsEmpty()));
  ++plan->session_version;
  auto opened = Open(worker, prompt, *plan, 16);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_LE(opened->reuse.reused_tokens, 40u);
  EXPECT_EQ(opened->reuse.chunk_tokens, 0u);
  EXPECT_EQ(opened->info.canonical_length, opened->info.length);
}

TEST_F(PromptChunksTest, ChunksThatAreNotOfTheSessionAreRefused) {
  const std::vector<uint32_t> saved = Concat({kSystem, kFirst});
  Save(saved, "s");
  SessionWorker worker(&store_, {.model = model_});
  std::vector<ManifestPageRef> pages;
  auto session = worker.sessions->Read(worker.tenant(), "s", &pages, Soon());
  ASSERT_TRUE(session.ok()) << session.status();
  constexpr uint64_t kMost = std::numeric_limits<uint64_t>::max();
  for (const std::vector<ReusedChunk>& chunks :
       std::vector<std::vector<ReusedChunk>>{{},
                                             {{50, 40, 0}},
                                             {{50, 40, 21}},
                                             {{kMost, 40, 2}},
                                             {{50, 40, kMost}},
                                             {{30, 40, 10}},
                                             {{50, 40, 5}, {60, 46, 5}},
                                             {{50, 40, 5}, {52, 45, 5}}}) {
    EXPECT_TRUE(absl::IsInvalidArgument(
        worker.host()->OpenSavedChunks(worker.tenant(), session->state, pages, chunks).status()));
    EXPECT_TRUE(absl::IsInvalidArgument(
        worker.host()->LookupSavedChunks(worker.tenant(), session->state, pages, chunks).status()));
  }
  EXPECT_TRUE(worker.host()->List(worker.tenant(), 0, 10).empty());
}

}  // namespace
}  // namespace pagetide
