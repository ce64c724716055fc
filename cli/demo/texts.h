// Texts: the licence texts of the machine, as prompts of known length. Byte-level tokens: a text of
// n bytes is n tokens. Immutable after Load; thread-safe.
#ifndef PAGETIDE_CLI_DEMO_TEXTS_H_
#define PAGETIDE_CLI_DEMO_TEXTS_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pagetide::demo {

class Texts {
 public:
  // NOT_FOUND names the first file that is missing from `dir`.
  static absl::StatusOr<Texts> Load(absl::string_view dir);

  // Names of the licences, as files are called.
  static const std::vector<std::string>& Names();
  // Bytes [begin, begin + count) of a licence. OUT_OF_RANGE with the numbers.
  absl::StatusOr<std::string> Cut(const std::string& name, size_t begin, size_t count) const;

 private:
  std::map<std::string, std::string> texts_;
};

// Bytes as token ids, without a begin-of-sequence token.
std::vector<uint32_t> BytesOf(absl::string_view text);

}  // namespace pagetide::demo

#endif  // PAGETIDE_CLI_DEMO_TEXTS_H_
