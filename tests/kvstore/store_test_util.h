// A folder that goes away with its owner, and raw access to stored bytes for tests that damage
// them.
#ifndef PAGETIDE_TESTS_KVSTORE_STORE_TEST_UTIL_H_
#define PAGETIDE_TESTS_KVSTORE_STORE_TEST_UTIL_H_

#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "core/page_store.h"

namespace pagetide {

class TempDir {
 public:
  TempDir() {
    std::string pattern = (std::filesystem::temp_directory_path() / "pagetide_XXXXXX").string();
    path_ = ::mkdtemp(pattern.data());
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

struct FoundRecord {
  std::string file;
  uint64_t offset = 0;  // of the record in the file
};

// Looks for the record of `key` in all segments of a store in `dir`; empty file when absent. Goes
// by the documented place of the key in a record (offset 32), not by the store's own code.
inline FoundRecord FindStoredRecord(const std::string& dir, const PageKey& key) {
  FoundRecord found;
  for (const auto& entry : std::filesystem::directory_iterator(dir + "/segments")) {
    std::ifstream in(entry.path(), std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    const absl::string_view needle = key.digest.view();
    for (size_t at = bytes.find(std::string(needle)); at != std::string::npos;
         at = bytes.find(std::string(needle), at + 1)) {
      if (at < 32 || bytes.compare(at - 32, 4, "PTPG") != 0) continue;
      found = {entry.path().string(), at - 32};  // the last copy is the current one
    }
  }
  return found;
}

inline void FlipFileBit(const std::string& file, uint64_t bit) {
  std::fstream f(file, std::ios::in | std::ios::out | std::ios::binary);
  f.seekg(static_cast<std::streamoff>(bit / 8));
  char c = 0;
  f.get(c);
  c = static_cast<char>(c ^ (1 << (bit % 8)));
  f.seekp(static_cast<std::streamoff>(bit / 8));
  f.put(c);
}

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_KVSTORE_STORE_TEST_UTIL_H_
