# A wheel for all releases of MLX: one build of this project for each folder that cmake/mlx_packages.py made in EACH_MLX.
include(ExternalProject)
file(GLOB releases RELATIVE "${EACH_MLX}" "${EACH_MLX}/*")
if(NOT releases)
  message(FATAL_ERROR
    "EACH_MLX has no release of MLX.\n"
    "  found:  ${EACH_MLX}\n"
    "  needed: a folder that cmake/mlx_packages.py has filled\n"
    "  fix:    ${Python_EXECUTABLE} cmake/mlx_packages.py ${EACH_MLX}")
endif()
foreach(mlx IN LISTS releases)
  ExternalProject_Add("mlx_${mlx}"
    SOURCE_DIR "${CMAKE_CURRENT_SOURCE_DIR}"
    BINARY_DIR "${CMAKE_CURRENT_BINARY_DIR}/mlx_${mlx}"
    CONFIGURE_COMMAND "${CMAKE_COMMAND}" -E env "PYTHONPATH=${EACH_MLX}/${mlx}" "${CMAKE_COMMAND}"
      -S <SOURCE_DIR> -B <BINARY_DIR> -G "${CMAKE_GENERATOR}" "-DCMAKE_BUILD_TYPE=${CMAKE_BUILD_TYPE}"
      "-DCMAKE_MAKE_PROGRAM=${CMAKE_MAKE_PROGRAM}" "-DCMAKE_OSX_ARCHITECTURES=${CMAKE_OSX_ARCHITECTURES}"
      "-DPython_EXECUTABLE=${Python_EXECUTABLE}"
    BUILD_COMMAND "${CMAKE_COMMAND}" -E env "PYTHONPATH=${EACH_MLX}/${mlx}" "${CMAKE_COMMAND}" --build <BINARY_DIR>
    INSTALL_COMMAND "${CMAKE_COMMAND}" --install <BINARY_DIR> --strip --prefix "${CMAKE_CURRENT_BINARY_DIR}/each")
endforeach()
install(DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/each/" DESTINATION . USE_SOURCE_PERMISSIONS)
