// Precompiled for tests that speak PageTide's own protocol (cmake/Precompiled.cmake): a cache of the compiler's, never a
// reason to leave out an #include.
#include "cmake/precompiled/domain.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include "pagetide/v1/admin.grpc.pb.h"
#include "pagetide/v1/page_store.grpc.pb.h"
#include "pagetide/v1/prefix.grpc.pb.h"
#include "pagetide/v1/router.grpc.pb.h"
#include "pagetide/v1/sequence.grpc.pb.h"
#include "pagetide/v1/sequence_edit.grpc.pb.h"
#include "pagetide/v1/session.grpc.pb.h"
