// Failpoints: named places in the store at which a test cuts the power, kills the process or looks
// on, and switches that plant a known bug, to prove that the checker finds it. Compiled into builds
// with tests only (PAGETIDE_FAILPOINTS); elsewhere the macros are nothing and the functions absent.
// Process-wide, which only tests may be. Thread-safe.
//
// A program is told by its environment: PAGETIDE_FAILPOINT=NAME:N ends it with SIGKILL when NAME is
// reached for the Nth time.
#ifndef PAGETIDE_KVSTORE_FAILPOINT_H_
#define PAGETIDE_KVSTORE_FAILPOINT_H_

#ifdef PAGETIDE_FAILPOINTS
#define PT_FAILPOINT(name) ::pagetide::HitFailpoint(name)
#define PT_BUG_IS_PLANTED(name) ::pagetide::IsBugPlanted(name)
#else
#define PT_FAILPOINT(name) static_cast<void>(0)
#define PT_BUG_IS_PLANTED(name) false
#endif

#include <functional>
#include <string>

namespace pagetide {

void HitFailpoint(const char* name);
bool IsBugPlanted(const char* name);

// Called at every failpoint by the thread that reached it; null: nobody. Returns when calls of the
// one before have ended: do not call it from an observer.
void SetFailpointObserver(std::function<void(const char* name)> observer);
// At most one; empty: none.
void PlantBug(std::string name);

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_FAILPOINT_H_
