// Sessions over ModelHost and the memory store: what is written, what comes back, what is refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <utility>

#include "kvstore/decorating_page_store.h"
#include "tests/worker/session_fixture.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

MonotonicTime Soon() {
  return HostUnderTest::Soon();
}

TEST(SessionTest, AnotherWorkerLoadsWhatOneSaved) {
  for (int num_groups : {1, 2}) {
    MemoryPageStore store;
    const std::vector<uint32_t> tokens = Tokens(100, 70);  // four full pages and 6 rows
    {
      SessionWorker a(&store, {.num_groups = num_groups});
      auto info = a.engine->OpenAndFill(tokens);
      ASSERT_TRUE(info.ok()) << info.status();
      SaveRequest request = a.Request(*info, "chat-1");
      request.metadata = {{"title", "hello"}};
      auto saved = a.sessions->Save(a.tenant(), a.host(), request, Soon());
      ASSERT_TRUE(saved.ok()) << saved.status();
      EXPECT_EQ(saved->version, 1u);
      EXPECT_EQ(saved->tokens, 70u);
      EXPECT_EQ(saved->pages, 5u * num_groups);
      EXPECT_EQ(saved->bytes_total, 5 * a.engine->model->geometry().bytes_per_page_of_tokens());
      EXPECT_EQ(saved->durability, Durability::kLocal);
    }
    SessionWorker b(&store, {.id = "b", .incarnation = 2, .num_groups = num_groups});
    auto peeked = b.sessions->Peek(b.tenant(), "chat-1", Soon());
    ASSERT_TRUE(peeked.ok()) << peeked.status();
    EXPECT_EQ(peeked->state.metadata.at("title"), "hello");
    EXPECT_EQ(b.host()->Counters().pages_restored, 0u);
    auto loaded = b.Load("chat-1");
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    EXPECT_EQ(loaded->open.info.length, 70u);
    EXPECT_EQ(loaded->open.reuse.store_tokens, 70u);
    EXPECT_EQ(loaded->session.state.tokens, tokens);
    auto wrong = b.engine->WrongRows(loaded->open.info.id, tokens);
    ASSERT_TRUE(wrong.ok()) << wrong.status();
    EXPECT_EQ(*wrong, 0u);
    EXPECT_EQ(b.host()->Counters().pages_restored, 5u * num_groups);
    // It goes on as if nothing had been.
    const std::vector<uint32_t> longer = Concat(tokens, Tokens(9000, 30));
    auto appended = b.engine->Append(loaded->open.info, longer);
    ASSERT_TRUE(appended.ok()) << appended.status();
    EXPECT_EQ(*b.engine->WrongRows(appended->id, longer), 0u);
  }
}

TEST(SessionTest, WritesOnlyWhatIsNew) {
  MemoryPageStore store;
  SessionWorker a(&store, {.num_frames = 64, .write_through = false});
  const uint64_t page = a.engine->model->geometry().bytes_per_page_of_tokens();
  std::vector<uint32_t> tokens = Tokens(0, 40);  // 2 pages and 8 rows
  auto info = a.engine->OpenAndFill(tokens);
  ASSERT_TRUE(info.ok()) << info.status();
  auto saved = a.Save(*info, "s");
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_EQ(saved->bytes_written, 3 * page);
  // Nothing changed: nothing is sent, not even the tail.
  saved = a.Save(*info, "s");
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_EQ(saved->version, 2u);
  EXPECT_EQ(saved->bytes_written, 0u);
  EXPECT_EQ(saved->bytes_total, 3 * page);
  // 8 rows fill the third page, 4 begin the next one.
  tokens = Concat(tokens, Tokens(500, 12));
  info = a.engine->Append(*info, tokens);
  ASSERT_TRUE(info.ok()) << info.status();
  saved = a.Save(*info, "s");
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_EQ(saved->bytes_written, 2 * page);
  EXPECT_EQ(saved->bytes_total, 4 * page);
  // Another name costs nothing, another worker's load and save neither.
  saved = a.Save(*info, "t");
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_EQ(saved->bytes_written, 0u);
  SessionWorker b(&store, {.id = "b", .incarnation = 2});
  auto loaded = b.Load("s");
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  saved = b.Save(loaded->open.info, "u");
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_EQ(saved->bytes_written, 0u);
  EXPECT_EQ(b.host()->Counters().pages_restored, loaded->open.restoring_pages);
  EXPECT_EQ(a.metrics.Value("pagetide_session_written_bytes_total"), static_cast<double>(5 * page));
}

TEST(SessionTest, LargerThanThePoolAndSpilledTailsAreSavedToo) {
  MemoryPageStore store;
  SessionWorker a(&store, {.num_frames = 4});
  std::vector<std::vector<uint32_t>> all;
  std::vector<SequenceInfo> infos;
  for (uint32_t i = 0; i < 6; ++i) {
    all.push_back(Tokens(1000 * i, 40));
    auto info = a.engine->OpenAndFill(all.back());
    ASSERT_TRUE(info.ok()) << info.status();
    infos.push_back(*info);
  }
  for (uint32_t i = 0; i < 6; ++i) {
    auto saved = a.Save(infos[i], absl::StrCat("s", i));
    ASSERT_TRUE(saved.ok()) << saved.status();
    // Appending drops the spilled record of the tail: not the one that the session names.
    auto more = a.engine->Append(infos[i], Concat(all[i], Tokens(70000 + i, 3)));
    ASSERT_TRUE(more.ok()) << more.status();
  }
  a.host()->Quiesce();
  SessionWorker b(&store, {.id = "b", .incarnation = 2, .num_frames = 4});
  for (uint32_t i = 0; i < 6; ++i) {
    auto loaded = b.Load(absl::StrCat("s", i));
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    auto wrong = b.engine->WrongRows(loaded->open.info.id, all[i]);
    ASSERT_TRUE(wrong.ok()) << wrong.status();
    EXPECT_EQ(*wrong, 0u);
  }
}

TEST(SessionTest, WhatIsAppendedDuringASaveIsNotPartOfIt) {
  MemoryPageStore store;
  SessionWorker a(&store, {});
  const std::vector<uint32_t> tokens = Tokens(0, 40);
  auto info = a.engine->OpenAndFill(tokens);
  ASSERT_TRUE(info.ok());
  auto snapshot =
      a.host()->Snapshot(a.tenant(), {info->id, info->epoch, std::nullopt}, std::nullopt);
  ASSERT_TRUE(snapshot.ok()) << snapshot.status();
  // The sequence is rewound into its tail and written anew, then grows.
  auto rewound = a.host()->Rewind(a.tenant(), {info->id, info->epoch, std::nullopt}, 34);
  ASSERT_TRUE(rewound.ok());
  const std::vector<uint32_t> other = Concat(Tokens(0, 34), Tokens(5000, 30));
  ASSERT_TRUE(a.engine->Append(rewound->info, other).ok());
  auto put = (*snapshot)->PutPages({}, Durability::kLocal, Soon());
  ASSERT_TRUE(put.ok()) << put.status();
  SessionState state = (*snapshot)->state();
  EXPECT_EQ(state.tokens, tokens);
  SessionWorker b(&store, {.id = "b", .incarnation = 2});
  auto opened = b.host()->OpenSaved(b.tenant(), state, put->pages, std::nullopt, std::nullopt);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(*b.engine->WrongRows(opened->info.id, tokens), 0u);
}

TEST(SessionTest, LoadsShareTheirPages) {
  MemoryPageStore store;
  const std::vector<uint32_t> tokens = Tokens(0, 72);
  {
    SessionWorker a(&store, {});
    auto info = a.engine->OpenAndFill(tokens);
    ASSERT_TRUE(info.ok());
    ASSERT_TRUE(a.Save(*info, "prompt").ok());
  }
  SessionWorker b(&store, {.id = "b", .incarnation = 2, .num_frames = 32});
  for (uint32_t i = 0; i < 20; ++i) {
    auto loaded = b.Load("prompt");
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    const std::vector<uint32_t> own = Concat(tokens, Tokens(10000 * (i + 1), 5));
    auto appended = b.engine->Append(loaded->open.info, own);
    ASSERT_TRUE(appended.ok()) << appended.status();
    EXPECT_EQ(*b.engine->WrongRows(appended->id, own), 0u);
  }
  EXPECT_EQ(b.sessions->LoadsHere(b.tenant(), "prompt"), 20u);
  EXPECT_EQ(b.host()->Counters().pages_restored, 5u);
  // A prompt that goes on differently finds the session's full pages by prefix, and its tail.
  auto opened = b.host()->Open(b.tenant(), Concat(tokens, Tokens(777000, 9)), {}, {});
  ASSERT_TRUE(opened.ok());
  EXPECT_EQ(opened->reuse.reused_tokens, 72u);
}

TEST(SessionTest, TheFirstTokensOnly) {
  MemoryPageStore store;
  SessionWorker a(&store, {});
  const std::vector<uint32_t> tokens = Tokens(0, 70);
  auto info = a.engine->OpenAndFill(tokens);
  ASSERT_TRUE(info.ok());
  SaveRequest request = a.Request(*info, "cut");
  request.keep_tokens = 39;
  auto saved = a.sessions->Save(a.tenant(), a.host(), request, Soon());
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_EQ(saved->tokens, 39u);
  EXPECT_EQ(saved->pages, 3u);
  SessionWorker b(&store, {.id = "b", .incarnation = 2});
  for (uint64_t length : {39, 32, 20, 1, 0}) {
    auto loaded = b.Load("cut", length);
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    const std::vector<uint32_t> head(tokens.begin(), tokens.begin() + length);
    if (length > 0) {
      EXPECT_EQ(*b.engine->WrongRows(loaded->open.info.id, head), 0u);
    }
    const std::vector<uint32_t> own = Concat(head, Tokens(40000 + length, 21));
    auto appended = b.engine->Append(loaded->open.info, own);
    ASSERT_TRUE(appended.ok()) << appended.status();
    EXPECT_EQ(*b.engine->WrongRows(appended->id, own), 0u);
  }
  EXPECT_THAT(b.Load("cut", 40).status().message(), HasSubstr("length = 40 is above the saved 39"));
  request.keep_tokens = 71;
  EXPECT_THAT(a.sessions->Save(a.tenant(), a.host(), request, Soon()).status().message(),
              HasSubstr("keep_tokens = 71 is above the sequence's length 70"));
}

TEST(SessionTest, VersionsAreComparedAndSet) {
  MemoryPageStore store;
  SessionWorker a(&store, {});
  auto info = a.engine->OpenAndFill(Tokens(0, 20));
  ASSERT_TRUE(info.ok());
  SaveRequest request = a.Request(*info, "s");
  request.expected_version = 1;
  absl::Status status = a.sessions->Save(a.tenant(), a.host(), request, Soon()).status();
  EXPECT_EQ(GetReason(status), error_reason::kVersionMismatch);
  EXPECT_EQ(GetReasonMetadata(status, "version"), "0");
  request.expected_version = 0;
  EXPECT_EQ(a.sessions->Save(a.tenant(), a.host(), request, Soon())->version, 1u);
  EXPECT_EQ(GetReason(a.sessions->Save(a.tenant(), a.host(), request, Soon()).status()),
            error_reason::kVersionMismatch);
  EXPECT_EQ(GetReason(a.sessions->Load(a.tenant(), "s", 7, "", std::nullopt, Soon()).status()),
            error_reason::kVersionMismatch);
  EXPECT_EQ(GetReason(a.sessions->Delete(a.tenant(), "s", 2, Soon()).status()),
            error_reason::kVersionMismatch);
  EXPECT_EQ(a.sessions->Delete(a.tenant(), "s", 1, Soon()).value(), 1u);
  EXPECT_EQ(GetReason(a.sessions->Delete(a.tenant(), "s", std::nullopt, Soon()).status()),
            "SESSION_NOT_FOUND");
  EXPECT_EQ(GetReason(a.Load("s").status()), "SESSION_NOT_FOUND");
}

TEST(SessionTest, ARetryOnAnotherWorkerGetsTheFirstAnswer) {
  MemoryPageStore store;
  SessionWorker a(&store, {.write_through = false});
  auto info = a.engine->OpenAndFill(Tokens(0, 40));
  ASSERT_TRUE(info.ok());
  SaveRequest request = a.Request(*info, "s");
  request.expected_version = 0;
  request.request_id = "r1";
  request.request_digest = Sha256Of("r1");
  auto first = a.sessions->Save(a.tenant(), a.host(), request, Soon());
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_GT(first->bytes_written, 0u);
  SessionWorker b(&store, {.id = "b", .incarnation = 2});
  auto again = b.sessions->FindAnswer(b.tenant(), request, Soon());
  ASSERT_TRUE(again.ok()) << again.status();
  ASSERT_TRUE(again->has_value());
  EXPECT_EQ((*again)->version, 1u);
  EXPECT_EQ((*again)->bytes_written, first->bytes_written);
  request.request_digest = Sha256Of("r2");
  EXPECT_EQ(GetReason(b.sessions->FindAnswer(b.tenant(), request, Soon()).status()),
            "REQUEST_ID_REUSED");
}

// Lets a test act between a save's look at the session and its manifest.
class HookedStore final : public DecoratingPageStore {
 public:
  explicit HookedStore(PageStore* inner) : DecoratingPageStore(inner) {}
  absl::StatusOr<PutManifestResult> PutManifest(const ManifestRecord& manifest,
                                                uint64_t expected_version,
                                                const std::optional<WriteFence>& fence,
                                                MonotonicTime deadline) override {
    if (before_manifest) std::exchange(before_manifest, nullptr)();
    return inner()->PutManifest(manifest, expected_version, fence, deadline);
  }
  std::function<void()> before_manifest;
};

TEST(SessionTest, TwoWorkersWithOneRequestIdDoNotAnswerForEachOther) {
  MemoryPageStore store;
  SessionWorker a(&store, {});
  HookedStore hooked(&store);
  SessionWorker b(&hooked, {.id = "b", .incarnation = 2});
  auto of_a = a.engine->OpenAndFill(Tokens(0, 40));
  auto of_b = b.engine->OpenAndFill(Tokens(500, 23));
  ASSERT_TRUE(of_a.ok() && of_b.ok());
  SaveRequest request_a = a.Request(*of_a, "s"), request_b = b.Request(*of_b, "s");
  request_a.request_id = request_b.request_id = "r1";
  const auto save_a = [&] {
    const auto saved = a.sessions->Save(a.tenant(), a.host(), request_a, Soon());
    ASSERT_TRUE(saved.ok()) << saved.status();
  };
  hooked.before_manifest = save_a;
  request_b.expected_version = 0;
  const auto lost = b.sessions->Save(b.tenant(), b.host(), request_b, Soon());
  EXPECT_EQ(GetReason(lost.status()), error_reason::kVersionMismatch)
      << "what is stored is the other's";
  EXPECT_EQ(a.sessions->Peek(a.tenant(), "s", Soon())->state.length(), 40u);
  // One that replaces what is there goes on from it.
  hooked.before_manifest = save_a;
  request_b.expected_version.reset();
  const auto saved = b.sessions->Save(b.tenant(), b.host(), request_b, Soon());
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_EQ(saved->version, 3u);
  EXPECT_EQ(b.sessions->Peek(b.tenant(), "s", Soon())->state.length(), 23u);
}

TEST(SessionTest, AStaleWorkerSavesNothing) {
  FakeClock clock;
  MemoryPageStore store({.clock = &clock});
  SessionWorker old(&store, {.incarnation = 1, .lease_clock = &clock});
  auto info = old.engine->OpenAndFill(Tokens(0, 20));
  ASSERT_TRUE(info.ok());
  ASSERT_TRUE(old.Save(*info, "s").ok());
  clock.Advance(absl::Seconds(10));
  SessionWorker young(&store, {.incarnation = 2, .lease_clock = &clock});
  auto loaded = young.Load("s");
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  ASSERT_TRUE(young.Save(loaded->open.info, "s").ok());
  old.lease().Step();
  EXPECT_EQ(GetReason(old.Save(*info, "s").status()), error_reason::kStaleEpoch);
  EXPECT_EQ(GetReason(old.sessions->Delete(old.tenant(), "s", std::nullopt, Soon()).status()),
            error_reason::kStaleEpoch);
  EXPECT_EQ(young.sessions->Peek(young.tenant(), "s", Soon())->version, 2u);
  EXPECT_EQ(old.metrics.Value("pagetide_session_calls_total",
                              {{"operation", "save"}, {"outcome", "STALE_EPOCH"}}),
            1);
}

TEST(SessionTest, ListsInOrderByPrefixAndPage) {
  MemoryPageStore store;
  SessionWorker a(&store, {});
  auto info = a.engine->OpenAndFill(Tokens(0, 5));
  ASSERT_TRUE(info.ok());
  for (const char* name : {"b", "a.1", "a.2", "a.3", "c"}) ASSERT_TRUE(a.Save(*info, name).ok());
  const auto names = [&](absl::string_view prefix, absl::string_view after, size_t limit) {
    std::vector<std::string> out;
    const auto listed = a.sessions->List(a.tenant(), prefix, after, limit, Soon());
    EXPECT_TRUE(listed.ok()) << listed.status();
    for (const ListedSession& session : *listed) {
      EXPECT_EQ(session.summary.tokens, 5u);
      out.push_back(session.name);
    }
    return out;
  };
  using ::testing::ElementsAre;
  EXPECT_THAT(names("", "", 10), ElementsAre("a.1", "a.2", "a.3", "b", "c"));
  EXPECT_THAT(names("a.", "", 2), ElementsAre("a.1", "a.2"));
  EXPECT_THAT(names("a.", "a.2", 2), ElementsAre("a.3"));
  Tenant other{"other", DeriveTenantSalt("secret", "other")};
  EXPECT_TRUE(a.sessions->List(other, "", "", 10, Soon())->empty());
  EXPECT_EQ(GetReason(a.sessions->Peek(other, "b", Soon()).status()), "SESSION_NOT_FOUND");
}

TEST(SessionTest, RefusesBadNamesAndForeignModels) {
  MemoryPageStore store;
  SessionWorker a(&store, {});
  auto info = a.engine->OpenAndFill(Tokens(0, 20));
  ASSERT_TRUE(info.ok());
  for (const std::string& name :
       {std::string(), std::string("../x"), std::string("a/b"), std::string("A"), std::string("-a"),
        std::string("a-"), std::string(10000, 'a'), std::string("a\0b", 3)}) {
    EXPECT_TRUE(absl::IsInvalidArgument(a.Save(*info, name).status())) << name.size();
    EXPECT_TRUE(absl::IsInvalidArgument(a.Load(name).status())) << name.size();
  }
  SaveRequest request = a.Request(*info, "s");
  request.level = Durability::kCache;
  EXPECT_TRUE(
      absl::IsInvalidArgument(a.sessions->Save(a.tenant(), a.host(), request, Soon()).status()));
  EXPECT_EQ(store.GetStats(Soon())->manifests, 0u);
  ASSERT_TRUE(a.Save(*info, "s").ok());
  const auto other = a.worker().AddModel(*TestModel(8), Soon());
  ASSERT_TRUE(other.ok()) << other.status();
  const absl::Status status = a.sessions
                                  ->Load(a.tenant(), "s", std::nullopt,
                                         (*other)->model().digest().ToHex(), std::nullopt, Soon())
                                  .status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_EQ(GetReason(status), "MODEL_MISMATCH");
  EXPECT_THAT(std::string(status.message()), HasSubstr("page_tokens 16 != 8"));
}

TEST(SessionTest, ADamagedPageShortensTheSequenceAndIsNeverReadWrong) {
  MemoryPageStore store;
  const std::vector<uint32_t> tokens = Tokens(0, 70);
  {
    SessionWorker a(&store, {});
    auto info = a.engine->OpenAndFill(tokens);
    ASSERT_TRUE(a.Save(*info, "s").ok());
  }
  const auto manifest = store.GetManifest("session/default/s", Soon());
  ASSERT_TRUE(manifest.ok());
  ASSERT_TRUE(store.FlipBit(manifest->pages[2].key, 12345));
  SessionWorker b(&store, {.id = "b", .incarnation = 2});
  auto loaded = b.Load("s");
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  auto ready = b.engine->WaitReady(loaded->open.info.id);
  ASSERT_TRUE(ready.ok()) << ready.status();
  EXPECT_EQ(ready->length, 32u);
  EXPECT_FALSE(ready->shortened_because.empty());
  EXPECT_EQ(*b.engine->WrongRows(loaded->open.info.id, Tokens(0, 32)), 0u);
}

}  // namespace
}  // namespace pagetide
