#include "kvstore/log_mark.h"

#include <array>
#include <cstddef>
#include <span>

#include "absl/strings/string_view.h"
#include "base/checksum.h"
#include "base/little_endian.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

constexpr uint32_t kSlotMagic = 0x4d4c5450;  // "PTLM"
constexpr uint16_t kSlotVersion = 1;
constexpr size_t kCheckedBytes = 4 + 2 + 2 + 8 + 8;
constexpr size_t kSlotUsedBytes = kCheckedBytes + 8;

uint64_t SlotChecksum(absl::string_view text) {
  return ChecksumOf(std::as_bytes(std::span(text.data(), text.size()))).low;
}

std::string EncodeSlot(const Mark& mark) {
  std::string out;
  AppendLittleEndian<uint32_t>(&out, kSlotMagic);
  AppendLittleEndian<uint16_t>(&out, kSlotVersion);
  AppendLittleEndian<uint16_t>(&out, 0);
  AppendLittleEndian<uint64_t>(&out, mark.number);
  AppendLittleEndian<uint64_t>(&out, static_cast<uint64_t>(absl::ToUnixNanos(mark.at)));
  AppendLittleEndian<uint64_t>(&out, SlotChecksum(out));
  return out;
}

// Number 0 unless the slot is whole.
Mark ParseSlot(absl::string_view bytes) {
  LittleEndianReader in(bytes);
  const uint32_t magic = in.Take<uint32_t>();
  const uint16_t version = in.Take<uint16_t>();
  in.Take<uint16_t>();
  Mark mark;
  mark.number = in.Take<uint64_t>();
  mark.at = absl::FromUnixNanos(static_cast<int64_t>(in.Take<uint64_t>()));
  const uint64_t checksum = in.Take<uint64_t>();
  const bool is_whole = in.ok() && magic == kSlotMagic && version == kSlotVersion &&
                        checksum == SlotChecksum(bytes.substr(0, kCheckedBytes));
  return is_whole ? mark : Mark{};
}

}  // namespace

absl::StatusOr<std::unique_ptr<LogMark>> LogMark::Open(const std::string& path, FileSystem* fs) {
  absl::StatusOr<std::unique_ptr<File>> file = fs->OpenFile(path);
  if (absl::IsNotFound(file.status())) file = fs->CreateFile(path);
  PT_RETURN_IF_ERROR(file.status());
  std::unique_ptr<LogMark> self(new LogMark(*std::move(file)));
  for (const uint64_t slot : {uint64_t{0}, uint64_t{1}}) {
    std::array<char, kSlotUsedBytes> bytes{};
    PT_ASSIGN_OR_RETURN(
        const uint64_t read,
        self->file_->ReadAt(slot * kSlotBytes, std::as_writable_bytes(std::span(bytes)), {}));
    const Mark mark = ParseSlot(absl::string_view(bytes.data(), read));
    if (mark.number <= self->last_.number) continue;
    self->last_ = mark;
    self->next_slot_ = 1 - slot;
  }
  return self;
}

absl::Status LogMark::Write(const Mark& mark) {
  std::string slot = EncodeSlot(mark);
  slot.resize(kSlotBytes, '\0');
  PT_RETURN_IF_ERROR(file_->WriteAt(next_slot_ * kSlotBytes,
                                    std::as_bytes(std::span(slot.data(), slot.size())), {}));
  PT_RETURN_IF_ERROR(file_->Sync());
  last_ = mark;
  next_slot_ = 1 - next_slot_;
  return absl::OkStatus();
}

}  // namespace pagetide
