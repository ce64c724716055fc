// Native sequence files: no bytes crash the parser, and what it accepts is written again bit for
// bit but for the proof. Input: one byte (whether the SHA-256 is made right first), then the file.
#include "formats/native.h"

#include <cstring>
#include <string>

#include "tests/fuzz/fuzz_check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace pagetide;
  FuzzInput in(data, size);
  const bool repair = in.Take<uint8_t>() % 2 == 1;
  std::string bytes(in.rest());
  if (repair && bytes.size() >= 64) {
    const Digest content = Sha256Of(absl::string_view(bytes).substr(0, bytes.size() - 64));
    bytes.replace(bytes.size() - 64, 32, content.ToBytes());
  }
  const auto file = NativeFile::Parse(bytes);
  if (!file.ok()) {
    FUZZ_CHECK(absl::IsDataLoss(file.status()) || absl::IsInvalidArgument(file.status()));
    return 0;
  }
  FUZZ_CHECK(NativeFileBytes(file->header()) == bytes.size());
  const TenantSalt salt = DeriveTenantSalt("secret", "tenant");
  FUZZ_CHECK(!file->IsProvenBy(salt));
  std::string again;
  const absl::Status written = WriteNative(
      file->header(), salt,
      [&](uint32_t group, uint32_t layer, RowKind kind, uint64_t first, uint64_t count,
          std::span<std::byte> out) {
        const auto rows = file->Rows(group, layer, kind, first, count);
        FUZZ_CHECK(rows.ok() && rows->size() == out.size());
        std::memcpy(out.data(), rows->data(), rows->size());
        return absl::OkStatus();
      },
      [&](absl::string_view part) {
        again.append(part.data(), part.size());
        return absl::OkStatus();
      });
  FUZZ_CHECK(written.ok());
  FUZZ_CHECK(again.size() == bytes.size());
  FUZZ_CHECK(again.compare(0, again.size() - 32, bytes, 0, bytes.size() - 32) == 0);
  const auto own = NativeFile::Parse(again);
  FUZZ_CHECK(own.ok() && own->IsProvenBy(salt));
  return 0;
}
