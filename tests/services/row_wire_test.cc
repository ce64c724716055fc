#include "worker/row_wire.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

namespace pagetide {
namespace {

// The bytes in slices of `step`, so that every field crosses a border somewhere.
grpc::ByteBuffer InSlices(const std::string& bytes, size_t step) {
  std::vector<grpc::Slice> slices;
  for (size_t at = 0; at < bytes.size(); at += step) slices.emplace_back(bytes.substr(at, step));
  return grpc::ByteBuffer(slices.data(), slices.size());
}

v1::AppendTokensRequest Rows(size_t num_bytes) {
  v1::AppendTokensRequest message;
  v1::RowPart* part = message.mutable_rows();
  part->set_group(1);
  part->set_layer(300);
  part->set_kind(v1::ROW_KIND_V);
  part->set_first_token(7);
  part->set_num_tokens(70000);
  for (size_t i = 0; i < num_bytes; ++i) {
    part->mutable_data()->push_back(static_cast<char>(i * 31));
  }
  return message;
}

std::string CopyOut(AppendMessage* message) {
  std::string data(message->num_bytes(), '\0');
  // In two goes, as a run that crosses a page is copied.
  const size_t half = data.size() / 2;
  const auto bytes = std::as_writable_bytes(std::span<char>(data));
  message->CopyNext(bytes.subspan(0, half));
  message->CopyNext(bytes.subspan(half));
  return data;
}

void ExpectRows(AppendMessage* message, const v1::RowPart& part) {
  EXPECT_FALSE(message->is_header());
  EXPECT_EQ(message->run().group, part.group());
  EXPECT_EQ(message->run().layer, part.layer());
  EXPECT_EQ(message->run().kind, RowKind::kV);
  EXPECT_EQ(message->run().first_token, part.first_token());
  EXPECT_EQ(message->run().num_tokens, part.num_tokens());
  ASSERT_EQ(message->num_bytes(), part.data().size());
  EXPECT_EQ(CopyOut(message), part.data());
}

TEST(RowWireTest, ReadsWhatProtobufWritesInAnySlicing) {
  for (size_t num_bytes : {0, 1, 1000, 1 << 20}) {
    const v1::AppendTokensRequest rows = Rows(num_bytes);
    for (size_t step : {size_t{1}, size_t{7}, size_t{4096}, size_t{4} << 20}) {
      if (num_bytes > 1000 && step < 1000) continue;  // a million slices prove nothing more
      AppendMessage message;
      *message.buffer() = InSlices(rows.SerializeAsString(), step);
      const absl::Status decoded = message.Decode();
      ASSERT_TRUE(decoded.ok()) << decoded;
      ExpectRows(&message, rows.rows());
    }
  }
}

TEST(RowWireTest, ReadsRowsWhoseFieldsComeInAnotherOrder) {
  const v1::AppendTokensRequest rows = Rows(100);
  v1::RowPart data_only;
  data_only.set_data(rows.rows().data());
  v1::RowPart rest = rows.rows();
  rest.clear_data();
  const std::string part = data_only.SerializeAsString() + rest.SerializeAsString();
  std::string bytes("\x12", 1);  // field 2, length-delimited
  bytes.push_back(static_cast<char>(0x80 | (part.size() & 0x7f)));
  bytes.push_back(static_cast<char>(part.size() >> 7));
  AppendMessage message;
  *message.buffer() = InSlices(bytes + part, 16);
  const absl::Status decoded = message.Decode();
  ASSERT_TRUE(decoded.ok()) << decoded;
  ExpectRows(&message, rows.rows());
}

TEST(RowWireTest, ReadsBytesOfAPage) {
  v1::AppendTokensRequest rows;
  rows.mutable_rows()->set_group(2);
  rows.mutable_rows()->set_kind(v1::ROW_KIND_PAGE);
  rows.mutable_rows()->set_page(3);
  rows.mutable_rows()->set_page_offset(1 << 20);
  rows.mutable_rows()->set_data("bytes");
  AppendMessage message;
  *message.buffer() = InSlices(rows.SerializeAsString(), 3);
  ASSERT_TRUE(message.Decode().ok());
  EXPECT_EQ(message.run().kind, RowKind::kPage);
  EXPECT_EQ(message.run().page, 3u);
  EXPECT_EQ(message.run().page_offset, 1u << 20);
  EXPECT_EQ(CopyOut(&message), "bytes");
}

TEST(RowWireTest, OneMessageObjectReadsManyMessages) {
  AppendMessage message;
  v1::AppendTokensRequest header;
  header.mutable_header()->set_append_id("a");
  for (int round = 0; round < 3; ++round) {
    *message.buffer() = InSlices(header.SerializeAsString(), 64);
    ASSERT_TRUE(message.Decode().ok());
    EXPECT_TRUE(message.is_header());
    EXPECT_EQ(message.header().append_id(), "a");
    const v1::AppendTokensRequest rows = Rows(1000 + round);
    *message.buffer() = InSlices(rows.SerializeAsString(), 64);
    ASSERT_TRUE(message.Decode().ok());
    ExpectRows(&message, rows.rows());
  }
}

TEST(RowWireTest, RefusesWhatIsNoPart) {
  AppendMessage message;
  *message.buffer() = InSlices("", 1);
  EXPECT_EQ(message.Decode().code(), absl::StatusCode::kInvalidArgument);
  *message.buffer() = InSlices("not protobuf at all", 4);
  EXPECT_EQ(message.Decode().code(), absl::StatusCode::kInvalidArgument);
  *message.buffer() = InSlices(Rows((1 << 20) + 1).SerializeAsString(), 1 << 16);
  EXPECT_EQ(message.Decode().code(), absl::StatusCode::kInvalidArgument);
}

TEST(RowWireTest, DamagedMessagesNeverReadOutsideTheBuffer) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const std::string good = Rows(300).SerializeAsString();
  int readable = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string bytes = good;
    for (uint64_t flips = 1 + random() % 4; flips > 0; --flips) {
      bytes[random() % 24] = static_cast<char>(random());  // the fields are in front
    }
    if (random() % 3 == 0) bytes.resize(random() % bytes.size());
    AppendMessage message;
    *message.buffer() = InSlices(bytes, 1 + random() % 64);
    if (!message.Decode().ok() || message.is_header()) continue;
    ASSERT_LE(message.num_bytes(), bytes.size());
    CopyOut(&message);
    ++readable;
  }
  EXPECT_GT(readable, 0);
}

}  // namespace
}  // namespace pagetide
