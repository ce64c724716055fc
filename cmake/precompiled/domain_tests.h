// Precompiled for tests that do not speak gRPC (cmake/Precompiled.cmake).
#include "cmake/precompiled/domain.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
