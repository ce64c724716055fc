// ASSERT_OK(status or StatusOr): ends the test with the text of what went wrong.
#ifndef PAGETIDE_TESTS_CONFORMANCE_ASSERT_OK_H_
#define PAGETIDE_TESTS_CONFORMANCE_ASSERT_OK_H_

#include <gtest/gtest.h>

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace pagetide::testing {

template <typename T>
std::string StatusText(const absl::StatusOr<T>& value) {
  return value.status().ToString();
}
inline std::string StatusText(const absl::Status& status) {
  return status.ToString();
}

}  // namespace pagetide::testing

#define ASSERT_OK(expr)                                                          \
  do {                                                                           \
    const auto& assert_ok_ = (expr);                                             \
    ASSERT_TRUE(assert_ok_.ok()) << ::pagetide::testing::StatusText(assert_ok_); \
  } while (false)

#endif  // PAGETIDE_TESTS_CONFORMANCE_ASSERT_OK_H_
