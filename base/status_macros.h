// Early return on a status that is not OK. The two macros of the whole code base.
#ifndef PAGETIDE_BASE_STATUS_MACROS_H_
#define PAGETIDE_BASE_STATUS_MACROS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// PT_RETURN_IF_ERROR(expr): returns expr's status from the enclosing function unless it is OK.
#define PT_RETURN_IF_ERROR(expr)                                                 \
  do {                                                                           \
    if (::absl::Status pt_status_ = (expr); !pt_status_.ok()) return pt_status_; \
  } while (false)

#define PT_MACRO_CONCAT_INNER_(a, b) a##b
#define PT_MACRO_CONCAT_(a, b) PT_MACRO_CONCAT_INNER_(a, b)

// PT_ASSIGN_OR_RETURN(lhs, expr): lhs = value of the StatusOr, or returns its status.
#define PT_ASSIGN_OR_RETURN(lhs, expr) \
  PT_ASSIGN_OR_RETURN_IMPL_(PT_MACRO_CONCAT_(pt_status_or_, __LINE__), lhs, expr)
#define PT_ASSIGN_OR_RETURN_IMPL_(tmp, lhs, expr) \
  auto tmp = (expr);                              \
  if (!tmp.ok()) return tmp.status();             \
  lhs = std::move(tmp).value()

#endif  // PAGETIDE_BASE_STATUS_MACROS_H_
