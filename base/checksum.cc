#include "base/checksum.h"

#include <algorithm>

#include "absl/strings/str_format.h"
#include "base/copy_bytes.h"

namespace pagetide {
namespace {

using checksum_internal::Kernel;

const Kernel& Best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return checksum_internal::Avx512Kernel();
  if (__builtin_cpu_supports("avx2")) return checksum_internal::Avx2Kernel();
#endif
  return checksum_internal::PortableKernel();
}

// All kernels give the same values and states.
const Kernel& TheKernel() {
  static const Kernel& best = Best();
  return best;
}

}  // namespace

std::string Checksum128::ToHex() const {
  return absl::StrFormat("%016x%016x", high, low);
}

Checksum128 ChecksumOf(std::span<const std::byte> bytes) {
  Checksum128 checksum;
  TheKernel().hash(bytes.data(), bytes.size(), &checksum.low, &checksum.high);
  return checksum;
}

Checksum128 CopyWithChecksum(std::span<const std::byte> src, std::span<std::byte> dst) {
  ChecksumStream stream;
  for (size_t at = 0; at < src.size(); at += ChecksumStream::kBlockBytes) {
    const auto block = src.subspan(at, std::min(ChecksumStream::kBlockBytes, src.size() - at));
    CopyBytes(block, dst.data() + at);
    stream.Update(block);
  }
  return stream.Get();
}

ChecksumStream::ChecksumStream() {
  TheKernel().reset(state_);
}

void ChecksumStream::Update(std::span<const std::byte> bytes) {
  if (!bytes.empty()) TheKernel().update(state_, bytes.data(), bytes.size());
}

Checksum128 ChecksumStream::Get() const {
  Checksum128 checksum;
  TheKernel().digest(state_, &checksum.low, &checksum.high);
  return checksum;
}

}  // namespace pagetide
