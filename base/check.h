// PT_CHECK(condition): ends the process when one of our own invariants is broken. Never for input.
#ifndef PAGETIDE_BASE_CHECK_H_
#define PAGETIDE_BASE_CHECK_H_

#include <cstdio>
#include <cstdlib>

#define PT_CHECK(condition)                                                                  \
  do {                                                                                       \
    if (!(condition)) {                                                                      \
      std::fprintf(stderr, "%s:%d: broken invariant: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                          \
    }                                                                                        \
  } while (false)

#endif  // PAGETIDE_BASE_CHECK_H_
