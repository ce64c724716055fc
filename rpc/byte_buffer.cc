#include "rpc/byte_buffer.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

// Wire types of the protobuf encoding (https://protobuf.dev/programming-guides/encoding).
enum WireType : uint32_t { kVarint = 0, kFixed64 = 1, kLengthDelimited = 2, kFixed32 = 5 };

// Tags are 32-bit and lengths 31-bit: protobuf's parser reads at most this many bytes of either.
constexpr int kMaxTagBytes = 5;
constexpr int kMaxVarintBytes = 10;

uint8_t* WriteVarint(uint64_t value, uint8_t* out) {
  while (value >= 0x80) {
    *out++ = static_cast<uint8_t>(value | 0x80);
    value >>= 7;
  }
  *out++ = static_cast<uint8_t>(value);
  return out;
}

// A position in a list of slices. Cheap to copy, so that a field can be gone over twice.
class Cursor {
 public:
  explicit Cursor(const std::vector<grpc::Slice>* slices) : slices_(slices) {
    for (const grpc::Slice& s : *slices) left_ += s.size();
    SkipEmpty();
  }

  size_t left() const { return left_; }

  // False at the end or for a varint of more than `max_bytes` bytes.
  bool ReadVarint(int max_bytes, uint64_t* value) {
    *value = 0;
    for (int i = 0; i < max_bytes; ++i) {
      if (left_ == 0) return false;
      const uint8_t byte = (*slices_)[index_].begin()[offset_];
      Advance(1);
      *value |= uint64_t{byte & 0x7Fu} << (7 * i);
      if (byte < 0x80) return true;
    }
    return false;
  }

  // Calls visit(slice, begin, end) over the next n bytes and moves past them. n ≤ left().
  template <typename Visit>
  void Take(size_t n, Visit visit) {
    while (n > 0) {
      const grpc::Slice& slice = (*slices_)[index_];
      const size_t here = std::min(n, slice.size() - offset_);
      visit(slice, offset_, offset_ + here);
      Advance(here);
      n -= here;
    }
  }
  void Skip(size_t n) {
    Take(n, [](const grpc::Slice&, size_t, size_t) {});
  }

 private:
  // n is at most what is left of the current slice.
  void Advance(size_t n) {
    offset_ += n;
    left_ -= n;
    SkipEmpty();
  }
  void SkipEmpty() {
    while (index_ < slices_->size() && offset_ == (*slices_)[index_].size()) {
      ++index_;
      offset_ = 0;
    }
  }

  const std::vector<grpc::Slice>* slices_;
  size_t index_ = 0;
  size_t offset_ = 0;
  size_t left_ = 0;
};

absl::Status Malformed(const google::protobuf::MessageLite& message, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("decode ", message.GetTypeName(), ": ", what));
}

absl::StatusOr<std::vector<grpc::Slice>> SlicesOf(const grpc::ByteBuffer& buffer,
                                                  const google::protobuf::MessageLite& message) {
  std::vector<grpc::Slice> slices;
  // An empty message may come without a buffer at all.
  if (buffer.Valid() && !buffer.Dump(&slices).ok()) return Malformed(message, "unreadable buffer");
  return slices;
}

// Tag and length of a length-delimited field.
uint8_t* WriteFieldHead(int field, uint64_t num_bytes, uint8_t* out) {
  out = WriteVarint(uint64_t{static_cast<uint32_t>(field)} << 3 | kLengthDelimited, out);
  return WriteVarint(num_bytes, out);
}

// outer_field 0: `header` is the whole message.
grpc::ByteBuffer Encode(int outer_field, const google::protobuf::MessageLite& header, int field,
                        std::span<const grpc::Slice> payload) {
  size_t payload_bytes = 0;
  for (const grpc::Slice& s : payload) payload_bytes += s.size();
  const size_t header_bytes = header.ByteSizeLong();
  // An empty payload is the default and is not written, as in protobuf.
  uint8_t payload_head[kMaxTagBytes + kMaxVarintBytes];
  const size_t payload_head_bytes =
      payload_bytes == 0
          ? 0
          : static_cast<size_t>(WriteFieldHead(field, payload_bytes, payload_head) - payload_head);
  std::vector<uint8_t> head(2 * (kMaxTagBytes + kMaxVarintBytes) + header_bytes);
  uint8_t* end = head.data();
  if (outer_field != 0) {
    end = WriteFieldHead(outer_field, header_bytes + payload_head_bytes + payload_bytes, end);
  }
  end = header.SerializeWithCachedSizesToArray(end);
  end = std::copy_n(payload_head, payload_head_bytes, end);
  std::vector<grpc::Slice> slices;
  slices.reserve(1 + payload.size());
  slices.emplace_back(head.data(), static_cast<size_t>(end - head.data()));
  slices.insert(slices.end(), payload.begin(), payload.end());
  return grpc::ByteBuffer(slices.data(), slices.size());
}

}  // namespace

grpc::ByteBuffer EncodeWithPayload(const google::protobuf::MessageLite& header, int field,
                                   std::span<const grpc::Slice> payload) {
  return Encode(0, header, field, payload);
}

grpc::ByteBuffer EncodeNestedPayload(int outer_field, const google::protobuf::MessageLite& inner,
                                     int field, std::span<const grpc::Slice> payload) {
  return Encode(outer_field, inner, field, payload);
}

grpc::ByteBuffer EncodeWithPayload(const google::protobuf::MessageLite& header, int field,
                                   grpc::Slice payload) {
  return EncodeWithPayload(header, field, std::span<const grpc::Slice>(&payload, 1));
}

grpc::ByteBuffer EncodeWithPayload(const google::protobuf::MessageLite& header, int field,
                                   std::span<const std::byte> payload) {
  return EncodeWithPayload(header, field, grpc::Slice(payload.data(), payload.size()));
}

grpc::ByteBuffer EncodeMessage(const google::protobuf::MessageLite& message) {
  return EncodeWithPayload(message, 1, std::span<const grpc::Slice>());
}

absl::Status PayloadView::CopyTo(std::span<std::byte> out) const {
  if (out.size() != size_) {
    return absl::InvalidArgumentError(
        absl::StrCat("copy payload of ", size_, " bytes into ", out.size(), " bytes"));
  }
  size_t at = 0;
  for (const grpc::Slice& s : slices_) {
    if (s.size() == 0) continue;
    std::memcpy(out.data() + at, s.begin(), s.size());
    at += s.size();
  }
  return absl::OkStatus();
}

std::string PayloadView::ToString() const {
  std::string out;
  out.reserve(size_);
  for (const grpc::Slice& s : slices_) {
    out.append(reinterpret_cast<const char*>(s.begin()), s.size());
  }
  return out;
}

void PayloadView::Clear() {
  slices_.clear();
  size_ = 0;
}

void PayloadView::Append(grpc::Slice slice) {
  size_ += slice.size();
  slices_.push_back(std::move(slice));
}

absl::Status DecodeWithPayload(const grpc::ByteBuffer& buffer, int field,
                               google::protobuf::MessageLite* header, PayloadView* payload) {
  header->Clear();
  payload->Clear();
  PT_ASSIGN_OR_RETURN(const std::vector<grpc::Slice> slices, SlicesOf(buffer, *header));
  Cursor cursor(&slices);
  // All fields but the payload, as they came. They are small: lists of numbers, keys, names.
  std::string rest;
  while (cursor.left() > 0) {
    Cursor start = cursor;
    uint64_t tag = 0;
    if (!cursor.ReadVarint(kMaxTagBytes, &tag) || tag > UINT32_MAX || tag >> 3 == 0) {
      return Malformed(*header, "bad field tag");
    }
    uint64_t length = 0;
    switch (tag & 7) {
      case kVarint:
        if (!cursor.ReadVarint(kMaxVarintBytes, &length)) return Malformed(*header, "bad varint");
        length = 0;
        break;
      case kFixed64:
        length = 8;
        break;
      case kFixed32:
        length = 4;
        break;
      case kLengthDelimited:
        if (!cursor.ReadVarint(kMaxTagBytes, &length)) return Malformed(*header, "bad length");
        break;
      default:
        return Malformed(*header, absl::StrCat("field ", tag >> 3, " has wire type ", tag & 7));
    }
    if (length > cursor.left()) {
      return Malformed(*header, absl::StrCat("field ", tag >> 3, " claims ", length, " bytes, ",
                                             cursor.left(), " are left"));
    }
    if (tag >> 3 == static_cast<uint64_t>(field) && (tag & 7) == kLengthDelimited) {
      payload->Clear();
      cursor.Take(length, [payload](const grpc::Slice& slice, size_t begin, size_t end) {
        payload->Append(begin == 0 && end == slice.size() ? slice : slice.sub(begin, end));
      });
      continue;
    }
    cursor.Skip(length);
    start.Take(start.left() - cursor.left(),
               [&rest](const grpc::Slice& slice, size_t begin, size_t end) {
                 rest.append(reinterpret_cast<const char*>(slice.begin()) + begin, end - begin);
               });
  }
  if (!header->ParseFromString(rest)) return Malformed(*header, "malformed field");
  return absl::OkStatus();
}

absl::Status DecodeMessage(const grpc::ByteBuffer& buffer, google::protobuf::MessageLite* message) {
  PT_ASSIGN_OR_RETURN(const std::vector<grpc::Slice> slices, SlicesOf(buffer, *message));
  std::string all;
  all.reserve(buffer.Valid() ? buffer.Length() : 0);
  for (const grpc::Slice& s : slices) {
    all.append(reinterpret_cast<const char*>(s.begin()), s.size());
  }
  if (!message->ParseFromString(all)) return Malformed(*message, "malformed field");
  return absl::OkStatus();
}

}  // namespace pagetide
