#include "core/request_memo.h"

#include <algorithm>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

const Digest kBody = Sha256Of("body");

// The answer, "" for none; ends the test on an error.
std::string Answer(const RequestMemo& memo, absl::string_view id, const Digest& body = kBody) {
  const auto found = memo.Find(id, body);
  EXPECT_TRUE(found.ok()) << found.status();
  return found.ok() ? found->value_or("") : "error";
}

TEST(RequestMemoTest, AnswersARepeatedRequestWithItsFirstAnswer) {
  FakeClock clock;
  RequestMemo memo({}, &clock);
  EXPECT_EQ(Answer(memo, "id"), "");
  memo.Remember("id", kBody, "first");
  memo.Remember("id", kBody, "second");
  EXPECT_EQ(Answer(memo, "id"), "first");
  EXPECT_EQ(memo.size(), 1u);
}

TEST(RequestMemoTest, AnEmptyAnswerIsAnAnswer) {
  FakeClock clock;
  RequestMemo memo({}, &clock);
  memo.Remember("id", kBody, "");
  const auto found = memo.Find("id", kBody);
  ASSERT_TRUE(found.ok());
  EXPECT_TRUE(found->has_value());
}

TEST(RequestMemoTest, RefusesAnIdThatCameWithAnotherBody) {
  FakeClock clock;
  RequestMemo memo({}, &clock);
  memo.Remember("id", kBody, "first");
  const auto found = memo.Find("id", Sha256Of("another body"));
  EXPECT_EQ(found.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(GetReason(found.status()), "REQUEST_ID_REUSED");
  EXPECT_EQ(Answer(memo, "id"), "first");
}

TEST(RequestMemoTest, AnEmptyIdIsNeverRemembered) {
  FakeClock clock;
  RequestMemo memo({}, &clock);
  memo.Remember("", kBody, "answer");
  EXPECT_EQ(Answer(memo, ""), "");
  EXPECT_EQ(Answer(memo, "", Sha256Of("another body")), "");
  EXPECT_EQ(memo.size(), 0u);
}

TEST(RequestMemoTest, TheOldestGoesFirst) {
  FakeClock clock;
  RequestMemo memo({.max_entries = 2, .ttl = absl::Hours(1)}, &clock);
  memo.Remember("a", kBody, "A");
  memo.Remember("b", kBody, "B");
  EXPECT_EQ(Answer(memo, "a"), "A");  // a look-up does not make it younger
  memo.Remember("c", kBody, "C");
  EXPECT_EQ(Answer(memo, "a"), "");
  EXPECT_EQ(Answer(memo, "b"), "B");
  EXPECT_EQ(Answer(memo, "c"), "C");
  EXPECT_EQ(memo.size(), 2u);
}

TEST(RequestMemoTest, BytesAreBoundedAndTheOldestGoFirst) {
  FakeClock clock;
  constexpr size_t kAnswer = 1000 - RequestMemo::kEntryBytes - 1;  // with an id of one character
  RequestMemo memo({.max_entries = 10'000, .max_bytes = 3000}, &clock);
  for (const char* id : {"a", "b", "c"}) memo.Remember(id, kBody, std::string(kAnswer, id[0]));
  EXPECT_EQ(memo.size(), 3u);
  EXPECT_EQ(memo.num_bytes(), 3000u);
  memo.Remember("d", kBody, std::string(kAnswer, 'd'));
  EXPECT_EQ(memo.size(), 3u);
  EXPECT_EQ(Answer(memo, "a"), "");
  EXPECT_EQ(Answer(memo, "b"), std::string(kAnswer, 'b'));
  // One that is larger than all room is kept alone: its caller may ask again at once.
  memo.Remember("e", kBody, std::string(10'000, 'e'));
  EXPECT_EQ(memo.size(), 1u);
  EXPECT_EQ(Answer(memo, "e"), std::string(10'000, 'e'));
  memo.Remember("f", kBody, "F");
  EXPECT_EQ(memo.size(), 1u);
  EXPECT_EQ(memo.num_bytes(), RequestMemo::kEntryBytes + 2);
}

TEST(RequestMemoTest, WithoutRoomNothingIsRemembered) {
  FakeClock clock;
  RequestMemo memo({.max_entries = 0, .ttl = absl::Hours(1)}, &clock);
  memo.Remember("a", kBody, "A");
  EXPECT_EQ(Answer(memo, "a"), "");
}

TEST(RequestMemoTest, ForgetsByAge) {
  FakeClock clock;
  RequestMemo memo({.max_entries = 10, .ttl = absl::Minutes(10)}, &clock);
  memo.Remember("a", kBody, "A");
  clock.Advance(absl::Minutes(10) - absl::Nanoseconds(1));
  memo.Remember("b", kBody, "B");
  EXPECT_EQ(Answer(memo, "a"), "A");
  clock.Advance(absl::Nanoseconds(1));
  EXPECT_EQ(Answer(memo, "a"), "");
  EXPECT_EQ(Answer(memo, "a", Sha256Of("another body")), "");  // a forgotten id is free again
  memo.Remember("a", Sha256Of("another body"), "new");
  EXPECT_EQ(Answer(memo, "a", Sha256Of("another body")), "new");
  EXPECT_EQ(Answer(memo, "b"), "B");
  EXPECT_EQ(memo.size(), 2u);
}

TEST(RequestMemoTest, AgreesWithANaiveModel) {
  struct Entry {
    std::string id, answer;
    Digest body;
    absl::Duration made;
  };
  for (uint32_t seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    std::mt19937 rng(seed);
    FakeClock clock;
    const size_t max_entries = 1 + rng() % 6;
    RequestMemo memo({.max_entries = max_entries, .ttl = absl::Seconds(10)}, &clock);
    std::vector<Entry> model;
    for (int step = 0; step < 1000; ++step) {
      const std::string id = absl::StrCat("id", rng() % 10);
      const Digest body = Sha256Of(absl::StrCat("body", rng() % 2));
      const absl::Duration now = clock.MonotonicNow().since_boot;
      std::erase_if(model, [&](const Entry& e) { return now - e.made >= absl::Seconds(10); });
      const auto known =
          std::find_if(model.begin(), model.end(), [&](const Entry& e) { return e.id == id; });
      const auto found = memo.Find(id, body);
      if (known == model.end()) {
        ASSERT_TRUE(found.ok());
        ASSERT_EQ(*found, std::nullopt);
      } else if (known->body == body) {
        ASSERT_TRUE(found.ok());
        ASSERT_EQ(*found, known->answer);
      } else {
        ASSERT_EQ(GetReason(found.status()), "REQUEST_ID_REUSED");
      }
      if (rng() % 2 == 0) {
        const std::string answer = absl::StrCat("answer", step);
        memo.Remember(id, body, answer);
        if (known == model.end()) {
          if (model.size() == max_entries) model.erase(model.begin());
          model.push_back({id, answer, body, now});
        }
        ASSERT_EQ(memo.size(), model.size());
      }
      clock.Advance(absl::Seconds(rng() % 3));
    }
  }
}

TEST(RequestMemoTest, OneOfManyThreadsSetsTheAnswer) {
  RequestMemo memo({.max_entries = 100, .ttl = absl::Hours(1)}, Clock::Real());
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&memo, t] {
      for (int i = 0; i < 500; ++i) {
        const std::string id = absl::StrCat("id", i % 150);
        memo.Remember(id, kBody, absl::StrCat(id, " by ", t));
        const auto found = memo.Find(id, kBody);
        ASSERT_TRUE(found.ok());
        if (*found) {
          ASSERT_EQ((*found)->rfind(absl::StrCat(id, " by "), 0), 0u);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(memo.size(), 100u);
}

}  // namespace
}  // namespace pagetide
