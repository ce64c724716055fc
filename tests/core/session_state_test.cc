#include "core/session_state.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "absl/strings/escaping.h"
#include "base/checksum.h"
#include "base/error_info.h"
#include "base/little_endian.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

SessionState Example() {
  SessionState state;
  state.tenant = "acme";
  state.model_name = "m";
  state.model_digest = Sha256Of("model");
  state.model_identity = Sha256Of("identity");
  state.page_tokens = 4;
  state.fingerprints = {Sha256Of("g0"), Sha256Of("g1")};
  state.canonical_length = 6;
  state.tokens = {1, 2, 3, 4, 5, 0xffffffff};
  state.positions = {0, 1, 1, 2, 9, 10};
  state.inputs = {{2, Sha256Of("image")}};
  state.groups = {{{.page = 0, .count = 4}, {.page = 1, .count = 2, .first_row = 4}},
                  {{.page = 2, .first_slot = 1, .count = 3},
                   {.page = 3, .count = 3, .first_row = 3, .shift = -5}}};
  state.metadata = {{"a", "1"}, {"title", "hello"}};
  state.request_digest = Sha256Of("request");
  state.pages_written = 3;
  state.bytes_written = 300;
  state.bytes_total = 400;
  return state;
}

// Puts the right checksum behind a body that a test has changed.
std::string Reseal(std::string bytes) {
  bytes.resize(bytes.size() - 16);
  const Checksum128 sum = ChecksumOf(std::as_bytes(std::span(bytes.data(), bytes.size())));
  AppendLittleEndian<uint64_t>(&bytes, sum.low);
  AppendLittleEndian<uint64_t>(&bytes, sum.high);
  return bytes;
}

TEST(SessionStateTest, ComesBackAsItWas) {
  const auto parsed = ParseSessionState(EncodeSessionState(Example()), 4);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(*parsed, Example());
  const auto empty = ParseSessionState(EncodeSessionState(SessionState{.page_tokens = 1}), 0);
  ASSERT_TRUE(empty.ok()) << empty.status();
  EXPECT_EQ(empty->length(), 0u);
}

TEST(SessionStateTest, GoldenBytes) {
  SessionState state;
  state.tenant = "t";
  state.model_name = "m";
  state.page_tokens = 2;
  state.fingerprints = {Digest{}};
  state.canonical_length = 1;
  state.tokens = {7};
  state.groups = {{{.page = 0, .count = 1}}};
  state.metadata = {{"k", "v"}};
  state.pages_written = 1;
  state.bytes_written = 2;
  state.bytes_total = 3;
  EXPECT_EQ(absl::BytesToHexString(EncodeSessionState(state)),
            "505453530100000001000000000000007401000000000000006d0000000000000000000000000000"
            "00000000000000000000000000000000000000000000000000000000000000000000000000000000"
            "00000000000000000000020000000100000000000000000000000000000000000000000000000000"
            "00000000000000000000010000000000000001000000000000000700000000000000000000000000"
            "00000000000001000000000000000000000000000000010000000000000000000000000000000100"
            "000001000000000000006b0100000000000000760000000000000000000000000000000000000000"
            "0000000000000000000000000100000000000000020000000000000003000000000000002630ebfa"
            "5f51b8dd760db3f0cfd5f52e");
}

TEST(SessionStateTest, EveryTruncationIsDataLoss) {
  const std::string bytes = EncodeSessionState(Example());
  for (size_t n = 0; n < bytes.size(); ++n) {
    EXPECT_EQ(ParseSessionState(bytes.substr(0, n), 4).status().code(), absl::StatusCode::kDataLoss)
        << n;
    // With a checksum that fits, only the counts can tell.
    if (n >= 16) {
      EXPECT_FALSE(ParseSessionState(Reseal(bytes.substr(0, n)), 4).ok()) << n;
    }
  }
}

TEST(SessionStateTest, EveryFlippedBitIsFound) {
  const std::string bytes = EncodeSessionState(Example());
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    std::string flipped = bytes;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
    EXPECT_FALSE(ParseSessionState(flipped, 4).ok()) << bit;
  }
}

TEST(SessionStateTest, HostileCountsAreRefusedBeforeAnythingIsAllocated) {
  // Wherever a count stands, the largest one there is: no parse may try to allocate it (that would
  // end the process), whatever the checksum says.
  const std::string bytes = EncodeSessionState(Example());
  for (size_t at = 8; at + 24 <= bytes.size(); ++at) {
    for (const std::string& huge :
         {std::string(8, '\xff'), std::string("\xff\xff\xff\xff\xff\xff\xff\x7f"),
          std::string("\x00\x00\x00\x80\x00\x00\x00\x00", 8)}) {
      std::string hostile = bytes;
      hostile.replace(at, 8, huge);
      ParseSessionState(Reseal(hostile), 4).IgnoreError();
    }
  }
}

TEST(SessionStateTest, NumbersThatCannotBe) {
  const auto fails_with = [](const SessionState& state, uint64_t num_pages, const char* text) {
    const auto parsed = ParseSessionState(EncodeSessionState(state), num_pages);
    EXPECT_EQ(parsed.status().code(), absl::StatusCode::kDataLoss) << parsed.status();
    EXPECT_THAT(parsed.status().message(), HasSubstr(text));
  };
  fails_with(Example(), 3, "page 3 of 3");
  SessionState state = Example();
  state.groups[0][1].count = 1;
  EXPECT_TRUE(ParseSessionState(EncodeSessionState(state), 4).ok());  // a row left out
  state.groups[0][1].count = 3;
  fails_with(state, 4, "rows [4, +3) behind row 4 of 6");
  state.groups[0][1] = {.page = 1, .count = 1, .first_row = 3};
  fails_with(state, 4, "rows [3, +1) behind row 4 of 6");
  state.groups[0][1].first_row = ~uint64_t{0};
  fails_with(state, 4, "behind row 4 of 6");
  state = Example();
  state.positions[5] = 3;
  fails_with(state, 4, "6 positions for 6 tokens, or not in order");
  state.positions.pop_back();
  fails_with(state, 4, "5 positions for 6 tokens");
  state.positions.assign(6, -1);
  fails_with(state, 4, "not in order");
  state = Example();
  state.groups[1][0].first_slot = 0xffffffff;
  fails_with(state, 4, "in a page of 4");
  state = Example();
  state.canonical_length = 7;
  fails_with(state, 4, "canonical length 7 of 6");
  state = Example();
  state.inputs[0].position = 6;
  fails_with(state, 4, "input at token 6 of 6");
  state = Example();
  state.page_tokens = 0;
  fails_with(state, 4, "page_tokens is 0");
}

TEST(SessionStateTest, ANewerVersionIsUnimplemented) {
  std::string bytes = EncodeSessionState(Example());
  bytes[4] = 2;
  EXPECT_EQ(ParseSessionState(Reseal(bytes), 4).status().code(), absl::StatusCode::kUnimplemented);
}

TEST(SessionStateTest, SummaryComesBackAndIsChecked) {
  const std::string bytes = EncodeSessionSummary(SummaryOf(Example()));
  EXPECT_EQ(*ParseSessionSummary(bytes), SummaryOf(Example()));
  for (size_t n = 0; n < bytes.size(); ++n) {
    EXPECT_TRUE(absl::IsDataLoss(ParseSessionSummary(bytes.substr(0, n)).status())) << n;
  }
  EXPECT_TRUE(absl::IsDataLoss(ParseSessionSummary(bytes + "x").status()));
  EXPECT_TRUE(absl::IsUnimplemented(ParseSessionSummary("\x02" + bytes.substr(1)).status()));
}

TEST(SessionStateTest, MetadataIsBounded) {
  std::map<std::string, std::string> metadata;
  EXPECT_TRUE(ValidateSessionMetadata(metadata).ok());
  for (int i = 0; i < 65; ++i) metadata[std::to_string(i)] = "x";
  EXPECT_THAT(ValidateSessionMetadata(metadata).message(), HasSubstr("65 entries, at most 64"));
  EXPECT_THAT(ValidateSessionMetadata({{"", "x"}}).message(), HasSubstr("key has 0 bytes"));
  EXPECT_THAT(ValidateSessionMetadata({{"k", std::string(65536, 'x')}}).message(),
              HasSubstr("65537 bytes, at most 65536"));
}

TEST(SessionStateTest, SaysWhatDiffersBetweenModels) {
  ModelSpec spec;
  spec.name = "llama";
  spec.weights_digest = Sha256Of("w");
  spec.geometry.page_tokens = 16;
  LayerGroupSpec group;
  group.layers = {0};
  group.kv_heads = 1;
  group.k_dim = group.v_dim = 8;
  spec.geometry.groups = {group};
  const Model model = Model::Create(spec).value();
  SessionState state;
  state.model_name = "llama";
  state.model_digest = model.digest();
  state.model_identity = model.identity();
  state.page_tokens = 16;
  state.fingerprints = {model.geometry().group(0).fingerprint()};
  EXPECT_TRUE(CheckSameModel(state, model).ok());

  const auto differs = [&](const ModelSpec& other) {
    const absl::Status status = CheckSameModel(state, Model::Create(other).value());
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_EQ(GetReason(status), "MODEL_MISMATCH");
    return std::string(status.message());
  };
  ModelSpec other = spec;
  other.weights_digest = Sha256Of("other");
  EXPECT_THAT(differs(other), HasSubstr("weights, tokenizer, adapters or numerics"));
  other = spec;
  other.geometry.page_tokens = 32;
  EXPECT_THAT(differs(other), HasSubstr("page_tokens 16 != 32"));
  other = spec;
  other.geometry.groups[0].k_type = DataType::kF32;
  EXPECT_THAT(differs(other), HasSubstr("geometry of layer group 0"));
  other = spec;
  other.geometry.groups.push_back(group);
  other.geometry.groups[1].layers = {1};
  EXPECT_THAT(differs(other), HasSubstr("layer groups 1 != 2"));
}

}  // namespace
}  // namespace pagetide
