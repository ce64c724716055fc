#include "worker/row_wire.h"

#include <google/protobuf/wire_format_lite.h>

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "worker/service_support.h"

namespace pagetide {
namespace {

using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedInputStream;

constexpr uint32_t Tag(int field, WireFormatLite::WireType type) {
  return static_cast<uint32_t>(field) << 3 | static_cast<uint32_t>(type);
}
constexpr uint32_t VarintTag(int field) {
  return Tag(field, WireFormatLite::WIRETYPE_VARINT);
}
constexpr uint32_t BytesTag(int field) {
  return Tag(field, WireFormatLite::WIRETYPE_LENGTH_DELIMITED);
}

}  // namespace

absl::StatusOr<RowRun> RunFromProto(absl::string_view field, const v1::RowPart& part) {
  RowRun run;
  PT_ASSIGN_OR_RETURN(run.kind, RowKindFromProto(absl::StrCat(field, ".kind"), part.kind()));
  run.group = part.group();
  run.layer = part.layer();
  run.first_token = part.first_token();
  run.num_tokens = part.num_tokens();
  run.page = part.page();
  run.page_offset = part.page_offset();
  return run;
}

absl::Status AppendMessage::Decode() {
  rest_.reset();
  reader_.reset();
  message_.Clear();
  num_bytes_ = copied_ = 0;
  v1::RowPart part;
  if (DecodeFast(&part)) return SetRun(part);
  return DecodeSlow();
}

bool AppendMessage::DecodeFast(v1::RowPart* part) {
  const uint64_t total = buffer_.Length();
  reader_ = std::make_unique<grpc::ProtoBufferReader>(&buffer_);
  if (!reader_->status().ok()) return false;
  rest_ = std::make_unique<CodedInputStream>(reader_.get());
  uint32_t length = 0;
  if (rest_->ReadTag() != BytesTag(v1::AppendTokensRequest::kRowsFieldNumber)) return false;
  if (!rest_->ReadVarint32(&length) || rest_->CurrentPosition() + uint64_t{length} != total) {
    return false;
  }
  for (;;) {
    const uint32_t tag = rest_->ReadTag();
    if (tag == BytesTag(v1::RowPart::kDataFieldNumber)) break;
    uint32_t value = 0;
    if (!rest_->ReadVarint32(&value)) return false;
    switch (tag) {
      case VarintTag(v1::RowPart::kGroupFieldNumber):
        part->set_group(value);
        break;
      case VarintTag(v1::RowPart::kLayerFieldNumber):
        part->set_layer(value);
        break;
      case VarintTag(v1::RowPart::kKindFieldNumber):
        part->set_kind(static_cast<v1::RowKind>(value));
        break;
      case VarintTag(v1::RowPart::kFirstTokenFieldNumber):
        part->set_first_token(value);
        break;
      case VarintTag(v1::RowPart::kNumTokensFieldNumber):
        part->set_num_tokens(value);
        break;
      case VarintTag(v1::RowPart::kPageFieldNumber):
        part->set_page(value);
        break;
      case VarintTag(v1::RowPart::kPageOffsetFieldNumber):
        part->set_page_offset(value);
        break;
      default:
        return false;
    }
  }
  if (!rest_->ReadVarint32(&length) || rest_->CurrentPosition() + uint64_t{length} != total) {
    return false;
  }
  num_bytes_ = length;
  return true;
}

absl::Status AppendMessage::DecodeSlow() {
  rest_.reset();
  reader_ = std::make_unique<grpc::ProtoBufferReader>(&buffer_);
  if (!reader_->status().ok() || !message_.ParseFromZeroCopyStream(reader_.get())) {
    return absl::InvalidArgumentError(
        absl::StrCat("a message of ", buffer_.Length(), " bytes is not an AppendTokensRequest"));
  }
  switch (message_.part_case()) {
    case v1::AppendTokensRequest::kHeader:
      return absl::OkStatus();
    case v1::AppendTokensRequest::kRows:
      num_bytes_ = message_.rows().data().size();
      return SetRun(message_.rows());
    case v1::AppendTokensRequest::PART_NOT_SET:
      break;
  }
  return absl::InvalidArgumentError("an AppendTokensRequest has neither header nor rows");
}

absl::Status AppendMessage::SetRun(const v1::RowPart& part) {
  if (num_bytes_ > kMaxPartBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("rows.data has ", num_bytes_, " bytes, a part holds at most ", kMaxPartBytes));
  }
  PT_ASSIGN_OR_RETURN(run_, RunFromProto("rows", part));
  return absl::OkStatus();
}

void AppendMessage::CopyNext(std::span<std::byte> dst) {
  if (rest_ != nullptr) {
    // Decode compared the declared length with the buffer's, so the bytes are there.
    rest_->ReadRaw(dst.data(), static_cast<int>(dst.size()));
  } else {
    std::memcpy(dst.data(), message_.rows().data().data() + copied_, dst.size());
  }
  copied_ += dst.size();
}

}  // namespace pagetide
