#include "cli/demo/texts.h"

#include <fstream>
#include <sstream>
#include <utility>

#include "absl/strings/str_cat.h"

namespace pagetide::demo {

const std::vector<std::string>& Texts::Names() {
  static const auto* const kNames = new std::vector<std::string>{
      "Apache-2.0", "Artistic", "CC0-1.0", "GFDL-1.3", "GPL-2", "GPL-3", "LGPL-2.1", "MPL-2.0"};
  return *kNames;
}

absl::StatusOr<Texts> Texts::Load(absl::string_view dir) {
  Texts texts;
  for (const std::string& name : Names()) {
    const std::string path = absl::StrCat(dir, "/", name);
    std::ifstream file(path, std::ios::binary);
    if (!file) {
      return absl::NotFoundError(absl::StrCat(
          "open ", path, ": the demo reads the licence texts that Debian's base-files installs"));
    }
    std::stringstream bytes;
    bytes << file.rdbuf();
    texts.texts_[name] = std::move(bytes).str();
  }
  return texts;
}

absl::StatusOr<std::string> Texts::Cut(const std::string& name, size_t begin, size_t count) const {
  const auto text = texts_.find(name);
  if (text == texts_.end() || begin + count > text->second.size()) {
    return absl::OutOfRangeError(absl::StrCat("cut bytes [", begin, ", ", begin + count, ") from ",
                                              name, ": it has ",
                                              text == texts_.end() ? 0 : text->second.size()));
  }
  return text->second.substr(begin, count);
}

std::vector<uint32_t> BytesOf(absl::string_view text) {
  std::vector<uint32_t> tokens;
  tokens.reserve(text.size());
  for (const char c : text) tokens.push_back(static_cast<uint8_t>(c));
  return tokens;
}

}  // namespace pagetide::demo
