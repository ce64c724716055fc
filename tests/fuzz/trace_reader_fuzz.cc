// Trace files: no text crashes the two readers, and the pages they give lie in the table they
// count. Input: one byte that chooses the reader, then the file.
#include <sys/mman.h>
#include <unistd.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "replay/trace.h"
#include "tests/fuzz/fuzz_check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace pagetide;
  FuzzInput in(data, size);
  const uint8_t choice = in.Take<uint8_t>();
  const absl::string_view text = in.rest();
  const int fd = memfd_create("trace", MFD_CLOEXEC);
  FUZZ_CHECK(fd >= 0);
  FUZZ_CHECK(write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size()));
  const auto source = OpenTrace(absl::StrCat("/proc/self/fd/", fd),
                                choice % 2 == 0 ? TraceFormat::kMooncake : TraceFormat::kWeka);
  if (source.ok()) {
    absl::Duration last = absl::ZeroDuration();
    for (;;) {
      const auto request = (*source)->Next();
      FUZZ_CHECK(request.ok());
      if (!request->has_value()) break;
      FUZZ_CHECK((*request)->arrival >= last);
      last = (*request)->arrival;
      FUZZ_CHECK((*request)->input_tokens <= kMaxTraceTokens);
      for (const PageId page : (*request)->pages) {
        FUZZ_CHECK(page.value() < (*source)->num_pages());
      }
    }
  } else {
    FUZZ_CHECK(absl::IsInvalidArgument(source.status()));
  }
  close(fd);
  return 0;
}
